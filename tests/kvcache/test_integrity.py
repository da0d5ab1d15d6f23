"""Every way in which the books can be wrong is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loongjax.errors import IntegrityError
from loongjax.kvcache import BlockAllocator
from loongjax.plan import Chunk, Placement, PrefillStep, Share


def books() -> BlockAllocator:
    """Blocks of 4. 'a': 6 tokens on 0, then 3 on 1; 'b' shares them; 'c': 5 tokens on 0."""
    allocator = BlockAllocator(instances=2, slots=24, block_size=4)
    keep = {"a": (Share(0, 6), Share(1, 3)), "c": (Share(0, 5),)}
    step = PrefillStep(
        seq=0,
        group=(0, 1),
        chunks=tuple(
            Chunk(request=name, start=0, length=sum(s.tokens for s in shares), last=True)
            for name, shares in keep.items()
        ),
        keep=tuple(Placement(request=name, shares=shares) for name, shares in keep.items()),
    )
    allocator.apply(step)
    allocator.fork("a", "b")
    allocator.check_integrity()
    return allocator


def reference_lost(allocator: BlockAllocator) -> None:
    allocator._blocks[0].references[0] = 1


def reference_too_many(allocator: BlockAllocator) -> None:
    allocator._blocks[1].references[5] = 1


def release_forgets_the_blocks(allocator: BlockAllocator) -> None:
    del allocator._held["c"]


def held_block_given_back(allocator: BlockAllocator) -> None:
    blocks = allocator._blocks[0]
    blocks._returned[0] = 2
    blocks._returned_count = 1


def free_block_lost(allocator: BlockAllocator) -> None:
    allocator._blocks[1]._fresh += 1


def block_given_back_twice(allocator: BlockAllocator) -> None:
    blocks = allocator._blocks[0]
    blocks._returned[:2] = 5
    blocks._returned_count = 2
    blocks._fresh += 2


def entry_across_blocks(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs[0].entries[1, 0] += 1


def entry_too_long(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs[0].entries[1, 2] = 5


def entry_outside_the_pool(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs[0].entries[1, 0] = 24


def entry_in_the_block_of_another(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs[0].entries[1, 0] = 4


def shared_block_of_other_tokens(allocator: BlockAllocator) -> None:
    kv = allocator._held["b"]
    kv.runs[1].entries[0, 1] += 1
    kv.computed += 1


def two_entries_in_a_block(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs[0].entries[1, 0] = 8


def gap_in_positions(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs[0].entries[1, 1] += 1


def entries_out_of_order(allocator: BlockAllocator) -> None:
    entries = allocator._held["c"].runs[0].entries
    entries[:] = entries[::-1].copy()


def positions_start_late(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs[0].entries[:, 1] += 1


def token_not_counted(allocator: BlockAllocator) -> None:
    allocator._held["c"].computed -= 1


def share_not_counted(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs[0].tokens += 1


def tail_elsewhere(allocator: BlockAllocator) -> None:
    allocator._held["c"].next_slot += 1


def tail_on_another_instance(allocator: BlockAllocator) -> None:
    allocator._held["c"].last_instance = 1


def share_lost(allocator: BlockAllocator) -> None:
    del allocator._held["a"].runs[0]


def kv_lost(allocator: BlockAllocator) -> None:
    allocator._held["c"].runs.clear()


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (reference_lost, "instance 0: block 0 has 2 holders, counted are 1"),
        (reference_too_many, "instance 1: block 5 has 0 holders, counted are 1"),
        (release_forgets_the_blocks, "instance 0: block 2 has 0 holders, counted are 1; 2 such"),
        (held_block_given_back, r"4 blocks held and 3 free \(3 different, 1 of them held\) of 6"),
        (free_block_lost, r"1 blocks held and 4 free \(4 different, 0 of them held\) of 6"),
        (block_given_back_twice, r"4 blocks held and 2 free \(1 different, 0 of them held\) of 6"),
        (entry_across_blocks, r"entry \[13, 4, 1\] is not within one of 6 blocks of 4"),
        (entry_too_long, r"entry \[12, 4, 5\] is not within one"),
        (entry_outside_the_pool, r"entry \[24, 4, 1\] is not within one"),
        (entry_in_the_block_of_another, r"\[4, 4, 1\] overlaps entry \[4, 4, 2\]"),
        (
            shared_block_of_other_tokens,
            r"'b' on instance 1: entry \[0, 7, 3\] overlaps entry \[0, 6, 3\]",
        ),
        (two_entries_in_a_block, "2 entries overlap in 1 blocks"),
        (gap_in_positions, "are not positions 0 to 4 once each"),
        (entries_out_of_order, r"positions \[4, 0\] do not ascend"),
        (positions_start_late, "5 tokens from position 1 on"),
        (token_not_counted, "5 tokens from position 0 on, in 2 entries, are not positions 0 to 3"),
        (share_not_counted, "entries hold 5 tokens, booked are 6"),
        (tail_elsewhere, r"is \(0, 13\), booked is \(0, 14\)"),
        (tail_on_another_instance, r"is \(0, 13\), booked is \(1, 13\)"),
        (share_lost, "3 tokens from position 6 on"),
        (kv_lost, "no entries, booked are 5 tokens"),
    ],
)
def test_wrong_books_are_noticed(corrupt: Callable[[BlockAllocator], None], message: str) -> None:
    allocator = books()
    corrupt(allocator)
    with pytest.raises(IntegrityError, match=message):
        allocator.check_integrity()
