"""The allocator against a naive model that tracks what every slot holds."""

from __future__ import annotations

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

from loongjax.errors import PlanError
from loongjax.kvcache import BlockAllocator, MoveSlots
from loongjax.plan import (
    Share,
    Step,
)
from tests.kvcache.steps import INSTANCES, decode, entries_of, migrate, prefill

BLOCKS = 5
NAMES = st.sampled_from(["a", "b", "c", "d"])


def places(entries: np.ndarray) -> dict[int, int]:
    """The slot of every position in some entries."""
    return {
        position + i: slot + i for slot, position, count in entries.tolist() for i in range(count)
    }


@dataclass(eq=False)
class Block:
    """A block in the model; the lists of several requests may name the same one, or parts of
    it (`whole`).
    """

    instance: int
    tokens: list[int] = field(default_factory=list)
    whole: Block | None = None

    @property
    def place(self) -> int:
        """What tells the blocks of the pool apart."""
        return id(self.whole or self)


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
        holders = self.holders(last)
        return Share(last.instance, room) if room and holders == 1 else None

    def holders(self, block: Block) -> int:
        return sum(block.place in [b.place for b in bs] for bs in self.requests.values())

    def used(self, instance: int) -> int:
        found = {b.place for bs in self.requests.values() for b in bs if b.instance == instance}
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
            kept, new = self.moved(after[name], source, target, tokens)
            after[name] = kept
            needed[target] += new
        if not self.fits(needed):
            self.refused(step)
            return
        self.carry_out(chosen, self.allocator.apply(step).moves)
        self.requests = after

    def moved(
        self, blocks: list[Block], source: int, target: int, tokens: int
    ) -> tuple[list[Block], int]:
        """Blocks after a move, and how many of them are new."""
        parts: list[Block | list[int]] = []
        for block in reversed(blocks):
            moving = block.tokens[-tokens:] if tokens and block.instance == source else []
            if not moving:
                parts.append(block)
                continue
            tokens -= len(moving)
            parts.append(moving)
            if len(moving) < len(block.tokens):
                rest = block.tokens[: -len(moving)]
                parts.append(Block(source, rest, block.whole or block))
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
        return kept, new

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
        self.pool |= arrived  # what is shared stays where it was, too
        lasts = {(move.request, move.source): move.left for move in moves}
        for (name, source), entries in lasts.items():
            np.testing.assert_array_equal(entries_of(self.allocator, name, source), entries)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), dst=NAMES)
    def fork(self, data: st.DataObject, dst: str) -> None:
        src = data.draw(st.sampled_from(sorted(self.requests)))
        if dst in self.requests:
            with pytest.raises(PlanError, match="cannot fork"):
                self.allocator.fork(src, dst)
            return
        if not self.has_table_room(src):
            with pytest.raises(PlanError, match=r"cannot fork .* block tables have room for 2"):
                self.allocator.fork(src, dst)
            return
        self.allocator.fork(src, dst)
        self.requests[dst] = list(self.requests[src])

    def has_table_room(self, src: str) -> bool:
        """Whether every instance has at most two entries for each block, come what may."""
        for i in {block.instance for block in self.requests[src]}:
            held = [b for blocks in self.requests.values() for b in blocks if b.instance == i]
            more = sum(block.instance == i for block in self.requests[src])
            free = BLOCKS - self.used(i) // self.block_size
            if len(held) + more + free > 2 * BLOCKS:
                return False
        return True

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
                for slot, position, count in entries_of(self.allocator, name, instance).tolist()
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
            said = self.allocator.whereabouts(name)
            assert said.shares == self.allocator.shares(name) == tuple(sorted(sums.items()))
            assert said.computed == self.allocator.computed(name) == sums.total()
            tail = self.tail(name) if blocks else None
            assert said.tail == tail
            room: Counter[int] = Counter()
            for block in blocks:
                room[block.instance] += self.block_size - len(block.tokens)
            if tail:
                room[tail.instance] -= tail.tokens
            assert said.holes == tuple(sorted((+room).items()))
            shared: Counter[int] = Counter()
            for block in blocks:
                shared[block.instance] += self.block_size * (self.holders(block) > 1)
            assert said.shared == tuple(sorted((+shared).items()))


def machine(size: int) -> type[unittest.TestCase]:
    """The test of one block size."""
    made: Any = type(f"BlockSize{size}", (AllocatorMachine,), {"block_size": size})
    made.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
    case: type[unittest.TestCase] = made.TestCase
    return case


TestBlockSize1 = machine(1)
TestBlockSize3 = machine(3)
TestBlockSize16 = machine(16)
