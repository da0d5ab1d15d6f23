"""What the allocator gives, refuses and says, case by case."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from loongjax.errors import ConfigError, PlanError
from loongjax.kvcache import BlockAllocator
from loongjax.plan import (
    Chunk,
    DecodeStep,
    Placement,
    PrefillStep,
    Share,
)
from tests.kvcache.steps import decode, entries_of, migrate, prefill


def places(entries: np.ndarray) -> dict[int, int]:
    """The slot of every position in some entries."""
    return {
        position + i: slot + i for slot, position, count in entries.tolist() for i in range(count)
    }


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
    assert allocator.whereabouts("a").tail == Share(0, 3)
    first = allocator.apply(decode(("a", 0)))
    away = allocator.apply(decode(("a", 1)))
    back = allocator.apply(decode(("a", 0)))
    assert (first.slots, away.slots, back.slots) == ((5,), (0,), (8,))
    np.testing.assert_array_equal(entries_of(allocator, "a", 0), [[0, 0, 4], [4, 4, 2], [8, 7, 1]])
    np.testing.assert_array_equal(entries_of(allocator, "a", 1), [[0, 6, 1]])


def test_chunk_fills_the_partly_filled_block_first() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(1, 2)])))
    plan = allocator.apply(prefill(("a", 2, [(1, 5), (0, 1)])))
    np.testing.assert_array_equal(plan.shares[0].entries, [[2, 2, 2], [4, 4, 3]])
    np.testing.assert_array_equal(plan.shares[1].entries, [[0, 7, 1]])
    np.testing.assert_array_equal(entries_of(allocator, "a", 1), [[0, 0, 4], [4, 4, 3]])


def test_shared_block_is_written_again_once_one_holder_is_left() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(0, 2)])))
    allocator.fork("a", "b")
    assert allocator.used_slots(0) == 4
    assert allocator.whereabouts("a").tail is allocator.whereabouts("b").tail is None
    assert allocator.apply(decode(("a", 0))).slots == (4,)
    assert allocator.whereabouts("b").tail is None
    allocator.release("a")
    assert allocator.whereabouts("b").tail == Share(0, 2)
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
    found = allocator.whereabouts("a")
    assert (found.tail, found.holes) == (Share(1, 3), (Share(0, 3),))
    assert allocator.apply(decode(("a", 1))).slots == (5,)
    assert allocator.apply(decode(("a", 0))).slots == (8,)  # the cut block is not gone on with


def test_older_tokens_move_in_front_of_the_tail() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(0, 8), (1, 2)])))
    (move,) = allocator.apply(migrate(("a", 0, 1, 8))).moves
    assert len(move.left) == 0
    assert allocator.shares("a") == (Share(1, 10),)
    assert allocator.whereabouts("a").tail == Share(1, 2)
    np.testing.assert_array_equal(entries_of(allocator, "a", 1), [[4, 0, 4], [8, 4, 4], [0, 8, 2]])
    assert allocator.apply(decode(("a", 1))).slots == (2,)
    assert allocator.free_slots(0) == 16


def test_one_instance_gives_to_several() -> None:
    allocator = BlockAllocator(instances=3, slots=8, block_size=4)
    allocator.apply(prefill(("a", 0, [(0, 7)])))
    first, second = allocator.apply(migrate(("a", 0, 1, 2), ("a", 0, 2, 3))).moves
    assert (places(first.given), places(second.given)) == ({5: 0, 6: 1}, {2: 0, 3: 1, 4: 2})
    np.testing.assert_array_equal(second.left, [[0, 0, 2]])
    assert allocator.whereabouts("a").tail == Share(1, 2)


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
    ],
)
def test_move_that_contradicts_the_books_is_refused(
    moves: list[tuple[str, int, int, int]], message: str
) -> None:
    allocator = pool(instances=3)
    allocator.apply(prefill(("a", 0, [(0, 5)])))
    with pytest.raises(PlanError, match=message):
        allocator.apply(migrate(*moves))
    assert allocator.shares("a") == (Share(0, 5),)
    assert [allocator.used_slots(i) for i in range(3)] == [8, 0, 0]


def test_move_from_shared_blocks_is_a_copy() -> None:
    allocator = pool()
    allocator.apply(prefill(("a", 0, [(0, 8)])))
    allocator.fork("a", "b")
    assert allocator.whereabouts("a").shared == (Share(0, 8),)
    (move,) = allocator.apply(migrate(("b", 0, 1, 6))).moves
    np.testing.assert_array_equal(move.left, [[0, 0, 2]])
    np.testing.assert_array_equal(entries_of(allocator, "a", 0), [[0, 0, 4], [4, 4, 4]])
    assert [allocator.used_slots(i) for i in range(2)] == [8, 8]
    assert allocator.whereabouts("a").shared == allocator.whereabouts("b").shared == (Share(0, 4),)
    allocator.check_integrity()
    allocator.release("a")
    assert allocator.used_slots(0) == 4
    assert allocator.apply(decode(("b", 0))).slots == (4,)  # not behind its part of the old block
    allocator.check_integrity()


def test_relatives_are_those_forked_from_one_another() -> None:
    allocator = pool(blocks=20)
    allocator.apply(prefill(("a", 0, [(0, 4)]), ("z", 0, [(0, 4)])))
    allocator.fork("a", "b")
    allocator.fork("b", "c")
    assert allocator.relatives("c") == {"a", "b"}
    allocator.release("a")
    assert allocator.relatives("c") == {"b"}
    assert allocator.relatives("z") == allocator.relatives("ghost") == frozenset()


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
