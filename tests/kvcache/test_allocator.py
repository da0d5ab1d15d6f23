"""The allocator against a naive model that tracks what every slot holds."""

from __future__ import annotations

import subprocess
import sys
import unittest
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loongjax.errors import ConfigError, PlanError
from loongjax.kvcache import BlockAllocator, MoveSlots
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    MigrateStep,
    Move,
    Placement,
    PrefillStep,
    Share,
    Step,
)

INSTANCES = 3
BLOCKS = 5
NAMES = st.sampled_from(["a", "b", "c", "d"])


def prefill(*parts: tuple[str, int, list[tuple[int, int]]], seq: int = 0) -> PrefillStep:
    """A step of chunks `(request, start, shares)`."""
    lengths = [sum(tokens for _, tokens in shares) for _, _, shares in parts]
    return PrefillStep(
        seq=seq,
        group=tuple(range(INSTANCES)),
        chunks=tuple(
            Chunk(request=name, start=start, length=length, last=True)
            for (name, start, _), length in zip(parts, lengths, strict=True)
        ),
        keep=tuple(
            Placement(request=name, shares=tuple(Share(*share) for share in shares))
            for name, _, shares in parts
        ),
    )


def decode(*rows: tuple[str, int], seq: int = 0) -> DecodeStep:
    """A step of rows `(request, home)`."""
    return DecodeStep(
        seq=seq,
        group=tuple(range(INSTANCES)),
        rows=tuple(DecodeRow(name, home, home) for name, home in rows),
    )


def migrate(*moves: tuple[str, int, int, int], seq: int = 0) -> MigrateStep:
    """A step of moves `(request, source, target, tokens)`."""
    return MigrateStep(
        seq=seq, group=tuple(range(INSTANCES)), moves=tuple(Move(*move) for move in moves)
    )


def places(entries: np.ndarray) -> dict[int, int]:
    """The slot of every position in some entries."""
    return {
        position + i: slot + i for slot, position, count in entries.tolist() for i in range(count)
    }


@dataclass(eq=False)
class Block:
    """A block in the model; the lists of several requests may name the same one."""

    instance: int
    tokens: list[int] = field(default_factory=list)


class AllocatorMachine(RuleBasedStateMachine):
    """Random steps, forks and releases; every token's KV stays where its request finds it."""

    block_size = 0

    def __init__(self) -> None:
        super().__init__()
        spare = self.block_size - 1
        self.allocator = BlockAllocator(
            instances=INSTANCES,
            slots=BLOCKS * self.block_size + spare,
            block_size=self.block_size,
        )
        self.requests: dict[str, list[Block]] = {}
        self.pool: dict[tuple[int, int], int] = {}
        self.written = 0

    # The model

    def computed(self, name: str) -> int:
        return sum(len(block.tokens) for block in self.requests.get(name, []))

    def tail(self, name: str) -> Share | None:
        last = self.requests[name][-1]
        room = self.block_size - len(last.tokens)
        holders = sum(last in blocks for blocks in self.requests.values())
        return Share(last.instance, room) if room and holders == 1 else None

    def used(self, instance: int) -> int:
        found = {id(b) for bs in self.requests.values() for b in bs if b.instance == instance}
        return self.block_size * len(found)

    def new_blocks(self, name: str, shares: list[tuple[int, int]]) -> Counter[int]:
        """Blocks that consecutive shares need, by instance."""
        tail = self.tail(name) if name in self.requests else None
        needed: Counter[int] = Counter()
        for instance, tokens in shares:
            if tokens:
                room = tail.tokens if tail and tail.instance == instance else 0
                needed[instance] += -(-max(tokens - room, 0) // self.block_size)
                tail = None
        return needed

    def write(self, name: str, instance: int, slot: int, position: int) -> None:
        """One token's KV goes into the pool and into the model's newest or a new block."""
        assert position == self.computed(name)
        self.written += 1
        self.pool[instance, slot] = self.written
        tail = self.tail(name) if name in self.requests else None
        if tail is None or tail.instance != instance:
            self.requests.setdefault(name, []).append(Block(instance))
        self.requests[name][-1].tokens.append(self.written)

    def fits(self, needed: Counter[int]) -> bool:
        usable = BLOCKS * self.block_size
        return all(
            blocks * self.block_size + self.used(i) <= usable for i, blocks in needed.items()
        )

    def refused(
        self, step: Step, match: str = r"wants \d+ slots in new blocks on instance \d"
    ) -> None:
        before = [self.allocator.free_slots(i) for i in range(INSTANCES)]
        with pytest.raises(PlanError, match=match):
            self.allocator.apply(step)
        assert before == [self.allocator.free_slots(i) for i in range(INSTANCES)]

    # What happens

    @initialize()
    def one_request_has_kv(self) -> None:
        self.prefill([("a", [(0, self.block_size + 1)])])

    @rule(
        names=st.lists(NAMES, min_size=1, max_size=2, unique=True),
        data=st.data(),
    )
    def chunks(self, names: list[str], data: st.DataObject) -> None:
        tokens = st.integers(0, 2 * self.block_size + 1)
        share = st.tuples(st.integers(0, INSTANCES - 1), tokens)
        shares = st.lists(share, min_size=1, max_size=INSTANCES, unique_by=lambda s: s[0])
        self.prefill([(name, data.draw(shares)) for name in names])

    def prefill(self, parts: list[tuple[str, list[tuple[int, int]]]]) -> None:
        step = prefill(*[(name, self.computed(name), shares) for name, shares in parts])
        needed = sum((self.new_blocks(*part) for part in parts), Counter())
        if not self.fits(needed):
            self.refused(step)
            return
        plan = self.allocator.apply(step)
        expected = [(name, i, tokens) for name, shares in parts for i, tokens in shares if tokens]
        found = [(s.request, s.instance, int(s.entries[:, 2].sum())) for s in plan.shares]
        assert found == expected
        for share in plan.shares:
            for slot, position, count in share.entries.tolist():
                assert slot // self.block_size == (slot + count - 1) // self.block_size
                for i in range(count):
                    self.write(share.request, share.instance, slot + i, position + i)

    @rule(rows=st.dictionaries(NAMES, st.integers(0, INSTANCES - 1), min_size=1))
    def one_token_each(self, rows: dict[str, int]) -> None:
        step = decode(*rows.items())
        parts = [self.new_blocks(name, [(home, 1)]) for name, home in rows.items()]
        if not self.fits(sum(parts, Counter())):
            self.refused(step)
            return
        plan = self.allocator.apply(step)
        placed = zip(rows.items(), plan.slots, plan.positions, strict=True)
        for (name, home), slot, position in placed:
            self.write(name, home, slot, position)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def moves(self, data: st.DataObject) -> None:
        """Some KV of some requests moves; one may give to many, or take from many."""
        chosen: list[tuple[str, int, int, int]] = []
        names = st.lists(st.sampled_from(sorted(self.requests)), min_size=1, unique=True)
        for name in data.draw(names):
            taker = data.draw(st.integers(0, INSTANCES - 1))
            for source in data.draw(st.permutations(range(INSTANCES))):
                held = dict(self.allocator.shares(name)).get(source, 0)
                while held and source != taker and data.draw(st.booleans()):
                    tokens = data.draw(st.integers(1, held))
                    chosen.append((name, source, taker, tokens))
                    held -= tokens
        if not chosen:
            return
        step = migrate(*chosen)
        after = {name: list(blocks) for name, blocks in self.requests.items()}
        needed: Counter[int] = Counter()
        for name, source, target, tokens in chosen:
            kept, new, shared = self.moved(after[name], source, target, tokens)
            if shared:
                self.refused(step, "shared with a fork")
                return
            after[name] = kept
            needed[target] += new
        if not self.fits(needed):
            self.refused(step)
            return
        self.carry_out(chosen, self.allocator.apply(step).moves)
        self.requests = after

    def moved(
        self, blocks: list[Block], source: int, target: int, tokens: int
    ) -> tuple[list[Block], int, bool]:
        """Blocks after a move, how many of them are new, and whether it touches shared ones."""
        parts: list[Block | list[int]] = []
        shared = False
        for block in reversed(blocks):
            moving = block.tokens[-tokens:] if tokens and block.instance == source else []
            if not moving:
                parts.append(block)
                continue
            tokens -= len(moving)
            shared |= sum(block in others for others in self.requests.values()) > 1
            parts.append(moving)
            if len(moving) < len(block.tokens):
                parts.append(Block(source, block.tokens[: -len(moving)]))
        kept: list[Block] = []
        new = 0
        for is_block, run in groupby(reversed(parts), key=lambda part: isinstance(part, Block)):
            if is_block:
                kept += run
                continue
            stream = [token for part in run for token in part]
            for i in range(0, len(stream), self.block_size):
                kept.append(Block(target, stream[i : i + self.block_size]))
                new += 1
        return kept, new, shared

    def carry_out(
        self, chosen: list[tuple[str, int, int, int]], moves: tuple[MoveSlots, ...]
    ) -> None:
        """Moves what the allocator says, all at once, in the model's pool."""
        assert [(m.request, m.source, m.target, len(places(m.taken))) for m in moves] == chosen
        left: set[tuple[int, int]] = set()
        arrived: dict[tuple[int, int], int] = {}
        for move in moves:
            old, new = places(move.taken), places(move.given)
            assert list(old) == list(new) == sorted(old)
            left |= {(move.source, slot) for slot in old.values()}
            for position, slot in new.items():
                arrived[move.target, slot] = self.pool[move.source, old[position]]
        assert len(arrived) == sum(tokens for *_, tokens in chosen)
        assert left.isdisjoint(arrived)
        self.pool |= arrived
        lasts = {(move.request, move.source): move.left for move in moves}
        for (name, source), entries in lasts.items():
            np.testing.assert_array_equal(self.allocator.entries(name, source), entries)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), dst=NAMES)
    def fork(self, data: st.DataObject, dst: str) -> None:
        src = data.draw(st.sampled_from(sorted(self.requests)))
        if dst in self.requests:
            with pytest.raises(PlanError, match="cannot fork"):
                self.allocator.fork(src, dst)
            return
        self.allocator.fork(src, dst)
        self.requests[dst] = list(self.requests[src])

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        self.allocator.release(name)
        self.requests.pop(name, None)

    # What always holds

    @invariant()
    def books_add_up(self) -> None:
        self.allocator.check_integrity()
        for i in range(INSTANCES):
            assert self.allocator.used_slots(i) == self.used(i)
            assert self.allocator.free_slots(i) == BLOCKS * self.block_size - self.used(i)

    @invariant()
    def every_request_finds_its_own_kv(self) -> None:
        for name, blocks in self.requests.items():
            expected = [token for block in blocks for token in block.tokens]
            found = {
                position + i: self.pool[instance, slot + i]
                for instance in range(INSTANCES)
                for slot, position, count in self.allocator.entries(name, instance).tolist()
                for i in range(count)
            }
            assert [found[position] for position in sorted(found)] == expected
            assert sorted(found) == list(range(self.computed(name)))

    @invariant()
    def views_agree(self) -> None:
        for name in ["a", "b", "c", "d"]:
            blocks = self.requests.get(name, [])
            sums: Counter[int] = Counter()
            for block in blocks:
                sums[block.instance] += len(block.tokens)
            assert self.allocator.shares(name) == tuple(sorted(sums.items()))
            assert self.allocator.computed(name) == sums.total()
            tail = self.tail(name) if blocks else None
            assert self.allocator.tail(name) == tail
            room: Counter[int] = Counter()
            for block in blocks:
                room[block.instance] += self.block_size - len(block.tokens)
            if tail:
                room[tail.instance] -= tail.tokens
            assert self.allocator.holes(name) == tuple(sorted((+room).items()))


def machine(size: int) -> type[unittest.TestCase]:
    """The test of one block size."""
    made: Any = type(f"BlockSize{size}", (AllocatorMachine,), {"block_size": size})
    made.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
    case: type[unittest.TestCase] = made.TestCase
    return case


TestBlockSize1 = machine(1)
TestBlockSize3 = machine(3)
TestBlockSize16 = machine(16)


def pool(instances: int = 2, blocks: int = 4, block_size: int = 4) -> BlockAllocator:
    return BlockAllocator(instances=instances, slots=blocks * block_size, block_size=block_size)


def test_refusal_names_instance_wanted_and_free() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(1, 9)])))
    message = (
        r"step 7 \(PrefillStep\) wants 8 slots in new blocks on instance 1, "
        r"where 4 of 16 are free\. Keep fewer tokens there, or preempt"
    )
    with pytest.raises(PlanError, match=message):
        allocator.apply(prefill(("b", 0, [(0, 3), (1, 5)]), seq=7))
    assert (allocator.shares("b"), allocator.free_slots(0)) == ((), 16)


def test_refused_decode_changes_no_row() -> None:
    allocator = pool(blocks=1)
    allocator.apply(prefill(("a", 0, [(0, 2)]), ("b", 0, [(1, 4)])))
    with pytest.raises(PlanError, match="wants 4 slots in new blocks on instance 1, where 0 of 4"):
        allocator.apply(decode(("a", 0), ("b", 1)))
    assert allocator.computed("a") == 2
    allocator.check_integrity()


def test_a_step_fits_where_each_home_has_a_block_or_the_tail_for_its_rows() -> None:
    allocator = pool(blocks=2)
    allocator.apply(prefill(("a", 0, [(0, 2)]), ("b", 0, [(1, 4)])))
    assert allocator.fits(decode(("a", 0), ("b", 0)))
    assert allocator.fits(decode(("a", 1)))
    assert not allocator.fits(decode(("a", 1), ("b", 1)))  # one block is free there


TWO_PLACEMENTS = prefill(("b", 0, [(0, 1)]), ("c", 0, [(0, 1)]))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (decode(("a", 0), ("a", 1)), "names a request twice"),
        (prefill(("b", 0, [(0, 1)]), ("b", 1, [(0, 1)])), "names a request twice"),
        (decode(("a", 2)), "instance 2, but instances are 0 to 1"),
        (decode(("a", -1)), "instance -1, but instances are 0 to 1"),
        (prefill(("b", 0, [(2, 1)])), "instance 2, but instances are 0 to 1"),
        (prefill(("a", 4, [(0, 1)])), "at token 4, but its KV has 5 tokens"),
        (prefill(("b", 0, [(0, 1), (0, 2)])), "one share for each instance"),
        (prefill(("b", 0, [(0, 3), (1, -1)])), "Keep every token once"),
        (
            PrefillStep(
                seq=0,
                group=(0,),
                chunks=(Chunk(request="b", start=0, length=3, last=True),),
                keep=(Placement(request="b", shares=(Share(0, 2),)),),
            ),
            "keeps 2 of the 3 tokens",
        ),
        (
            PrefillStep(
                seq=0,
                group=(0,),
                chunks=TWO_PLACEMENTS.chunks,
                keep=TWO_PLACEMENTS.keep[::-1],
            ),
            "placement of request 'c' beside the chunk of 'b'",
        ),
        (
            PrefillStep(
                seq=0,
                group=(0,),
                chunks=TWO_PLACEMENTS.chunks,
                keep=TWO_PLACEMENTS.keep[:1],
            ),
            "has 2 chunks but 1 placements",
        ),
    ],
)
def test_step_that_contradicts_the_books_is_refused(
    step: PrefillStep | DecodeStep, message: str
) -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(0, 5)])))
    with pytest.raises(PlanError, match=message):
        allocator.apply(step)
    assert allocator.shares("a") == (Share(0, 5),)
    assert (allocator.used_slots(0), allocator.used_slots(1)) == (8, 0)


def test_token_goes_into_the_newest_block_only() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(0, 5)])))
    assert allocator.tail("a") == Share(0, 3)
    first = allocator.apply(decode(("a", 0)))
    away = allocator.apply(decode(("a", 1)))
    back = allocator.apply(decode(("a", 0)))
    assert (first.slots, away.slots, back.slots) == ((5,), (0,), (8,))
    np.testing.assert_array_equal(allocator.entries("a", 0), [[0, 0, 4], [4, 4, 2], [8, 7, 1]])
    np.testing.assert_array_equal(allocator.entries("a", 1), [[0, 6, 1]])


def test_chunk_fills_the_partly_filled_block_first() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(1, 2)])))
    plan = allocator.apply(prefill(("a", 2, [(1, 5), (0, 1)])))
    np.testing.assert_array_equal(plan.shares[0].entries, [[2, 2, 2], [4, 4, 3]])
    np.testing.assert_array_equal(plan.shares[1].entries, [[0, 7, 1]])
    np.testing.assert_array_equal(allocator.entries("a", 1), [[0, 0, 4], [4, 4, 3]])


def test_shared_block_is_written_again_once_one_holder_is_left() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(0, 2)])))
    allocator.fork("a", "b")
    assert allocator.used_slots(0) == 4
    assert allocator.tail("a") is allocator.tail("b") is None
    assert allocator.apply(decode(("a", 0))).slots == (4,)
    assert allocator.tail("b") is None
    allocator.release("a")
    assert allocator.tail("b") == Share(0, 2)
    assert allocator.apply(decode(("b", 0))).slots == (2,)


def test_fork_of_a_request_without_kv_is_refused() -> None:
    with pytest.raises(PlanError, match=r"cannot fork 'a' \(0 KV tokens\)"):
        pool().fork("a", "b")


def test_moved_tokens_are_packed_and_a_block_that_is_cut_stays_in_part() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(0, 10)])))
    (move,) = allocator.apply(migrate(("a", 0, 1, 5))).moves
    np.testing.assert_array_equal(move.taken, [[5, 5, 3], [8, 8, 2]])
    np.testing.assert_array_equal(move.given, [[0, 5, 4], [4, 9, 1]])
    np.testing.assert_array_equal(move.left, [[0, 0, 4], [4, 4, 1]])
    assert allocator.shares("a") == (Share(0, 5), Share(1, 5))
    assert (allocator.tail("a"), allocator.holes("a")) == (Share(1, 3), (Share(0, 3),))
    assert allocator.apply(decode(("a", 1))).slots == (5,)
    assert allocator.apply(decode(("a", 0))).slots == (8,)  # the cut block is not gone on with


def test_older_tokens_move_in_front_of_the_tail() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(0, 8), (1, 2)])))
    (move,) = allocator.apply(migrate(("a", 0, 1, 8))).moves
    assert len(move.left) == 0
    assert allocator.shares("a") == (Share(1, 10),)
    assert allocator.tail("a") == Share(1, 2)
    np.testing.assert_array_equal(allocator.entries("a", 1), [[4, 0, 4], [8, 4, 4], [0, 8, 2]])
    assert allocator.apply(decode(("a", 1))).slots == (2,)
    assert allocator.free_slots(0) == 16


def test_one_instance_gives_to_several() -> None:
    allocator = BlockAllocator(instances=3, slots=8, block_size=4)
    allocator.apply(prefill(("a", 0, [(0, 7)])))
    first, second = allocator.apply(migrate(("a", 0, 1, 2), ("a", 0, 2, 3))).moves
    assert (places(first.given), places(second.given)) == ({5: 0, 6: 1}, {2: 0, 3: 1, 4: 2})
    np.testing.assert_array_equal(second.left, [[0, 0, 2]])
    assert allocator.tail("a") == Share(1, 2)


def test_emptied_blocks_serve_later_steps_alone() -> None:
    """Then a program may read and write in any order."""
    allocator = pool(blocks=2)
    allocator.apply(prefill(("a", 0, [(0, 8)]), ("b", 0, [(1, 4)])))
    with pytest.raises(PlanError, match="wants 4 slots in new blocks on instance 0, where 0 of 8"):
        allocator.apply(migrate(("a", 0, 1, 4), ("b", 1, 0, 4)))
    assert allocator.shares("a") == (Share(0, 8),)
    allocator.apply(migrate(("a", 0, 1, 4)))
    (move,) = allocator.apply(migrate(("b", 1, 0, 4))).moves
    np.testing.assert_array_equal(move.given, [[4, 0, 4]])


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ([("a", 0, 1, 6)], r"moves 6 KV tokens of request 'a' away from instance 0, .* holds 5"),
        ([("a", 0, 1, 3), ("a", 0, 2, 3)], "which holds 2 then"),
        ([("a", 0, 1, 0)], "moves 0 KV tokens"),
        ([("a", 1, 0, 1)], "which holds 0 then"),
        ([("ghost", 0, 1, 1)], "which holds 0 then"),
        ([("a", 0, 0, 1)], "both to instance 0 and away from it"),
        ([("a", 0, 1, 1), ("a", 1, 2, 1)], "both to instance 1 and away from it"),
        ([("a", 0, 3, 1)], "instance 3, but instances are 0 to 2"),
        ([("f", 2, 0, 3)], r"'f' away from instance 2, but 1 of the 2 blocks .* shared with a"),
    ],
)
def test_move_that_contradicts_the_books_is_refused(
    moves: list[tuple[str, int, int, int]], message: str
) -> None:
    allocator = pool(instances=3)
    allocator.apply(prefill(("a", 0, [(0, 5)]), ("e", 0, [(2, 8)])))
    allocator.fork("e", "f")
    allocator.apply(decode(("f", 2)))
    with pytest.raises(PlanError, match=message):
        allocator.apply(migrate(*moves))
    assert allocator.shares("a") == (Share(0, 5),)
    assert [allocator.used_slots(i) for i in range(3)] == [8, 0, 12]
    allocator.apply(migrate(("f", 2, 0, 1)))  # its own block
    allocator.check_integrity()


def test_freed_blocks_are_taken_again_ascending_and_an_empty_pool_starts_over() -> None:
    allocator = pool(instances=1, blocks=6, block_size=1)
    allocator.apply(prefill(("a", 0, [(0, 2)]), ("b", 0, [(0, 2)]), ("c", 0, [(0, 1)])))
    allocator.release("b")
    assert allocator.apply(decode(("c", 0))).slots == (2,)
    allocator.release("a")
    plan = allocator.apply(prefill(("d", 0, [(0, 4)])))
    assert plan.shares[0].entries[:, 0].tolist() == [0, 1, 3, 5]
    allocator.release("d")
    allocator.release("c")
    assert allocator.apply(decode(("e", 0))).slots == (0,)


def test_long_prompt_in_single_slots() -> None:
    allocator = BlockAllocator(instances=2, slots=100_000, block_size=1)
    plan = allocator.apply(prefill(("a", 0, [(0, 60_000), (1, 40_000)])))
    expected = np.stack([np.arange(40_000), np.arange(60_000, 100_000), np.ones(40_000)], 1)
    np.testing.assert_array_equal(plan.shares[1].entries, expected)
    assert plan.shares[1].entries.dtype == np.int32
    allocator.check_integrity()


def test_remainder_of_the_slots_is_not_used() -> None:
    allocator = BlockAllocator(instances=1, slots=11, block_size=4)
    assert (allocator.slots, allocator.usable, allocator.free_slots(0)) == (11, 8, 8)


@pytest.mark.parametrize(("instances", "slots", "block_size"), [(0, 8, 4), (1, 3, 4), (1, 8, 0)])
def test_pool_that_holds_nothing_is_refused(instances: int, slots: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"{slots} slots each in blocks of {block_size}"):
        BlockAllocator(instances=instances, slots=slots, block_size=block_size)


def test_host_half_does_not_import_jax() -> None:
    code = "import sys, loongjax.kvcache; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
