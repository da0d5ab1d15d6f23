"""The second set of books finds what an allocator must never do."""

from __future__ import annotations

import numpy as np
import pytest

from loongjax.errors import IntegrityError
from loongjax.kvcache import (
    BlockAllocator,
    DecodeSlots,
    MigrateSlots,
    MoveSlots,
    PrefillSlots,
    ShareSlots,
)
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    MigrateStep,
    Move,
    Placement,
    PrefillStep,
    Share,
)
from loongjax.simulator.ledger import Ledger

SIZE = 4


def entries(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, 3)


def prefill(ledger: Ledger, name: str, *rows: tuple[int, int, int], instance: int = 0) -> None:
    count = sum(row[2] for row in rows)
    step = PrefillStep(
        seq=0,
        group=(0, 1),
        chunks=(Chunk(request=name, start=0, length=count, last=True),),
        keep=(Placement(request=name, shares=(Share(instance, count),)),),
    )
    share = ShareSlots(request=name, instance=instance, entries=entries(*rows))
    ledger.apply(step, PrefillSlots(seq=0, shares=(share,)))


def decode(ledger: Ledger, name: str, slot: int, instance: int = 0) -> None:
    step = DecodeStep(seq=1, group=(0, 1), rows=(DecodeRow(name, instance, instance),))
    ledger.apply(step, DecodeSlots(seq=1, slots=(slot,), positions=(0,)))


@pytest.fixture
def ledger() -> Ledger:
    """`a` holds blocks 0 and 1 of instance 0, the second half full; `b` holds nothing."""
    made = Ledger(BlockAllocator(instances=2, slots=16, block_size=SIZE))
    made.open("a")
    made.open("b")
    prefill(made, "a", (0, 0, 4), (4, 4, 2))
    return made


def test_it_counts_tokens_by_instance(ledger):
    decode(ledger, "a", 6)
    decode(ledger, "a", 0, instance=1)
    assert dict(ledger.tokens("a")) == {0: 7, 1: 1}
    ledger.drop("a")
    assert dict(ledger.tokens("a")) == {}
    prefill(ledger, "b", (0, 0, 4))
    ledger.close("b")


@pytest.mark.parametrize("slot", [0, 4])
def test_a_block_given_out_twice_is_found(ledger, slot):
    with pytest.raises(IntegrityError, match=r"block . of instance 0, which belongs to 'a'"):
        decode(ledger, "b", slot)
    with pytest.raises(IntegrityError, match="which belongs to 'a'"):
        prefill(ledger, "b", (8, 0, 4), (slot, 4, 1))


def test_a_token_in_the_middle_of_a_block_of_nobody_is_found(ledger):
    with pytest.raises(IntegrityError, match="belongs to 'nobody'"):
        decode(ledger, "a", 9)
    with pytest.raises(IntegrityError, match="belongs to 'nobody'"):
        prefill(ledger, "b", (13, 0, 2))


def test_a_move_frees_what_it_takes_and_no_more(ledger):
    step = MigrateStep(seq=2, group=(0, 1), moves=(Move("a", 0, 1, 3),))
    move = MoveSlots(
        request="a",
        source=0,
        target=1,
        taken=entries((3, 3, 1), (4, 4, 2)),
        given=entries((8, 3, 3)),
        left=entries((0, 0, 3)),
    )
    ledger.apply(step, MigrateSlots(seq=2, moves=(move,)))
    assert dict(ledger.tokens("a")) == {0: 3, 1: 3}
    prefill(ledger, "b", (4, 0, 4))
    with pytest.raises(IntegrityError, match="belongs to 'a'"):
        decode(ledger, "b", 0)


def test_totals_are_held_against_the_allocator():
    allocator = BlockAllocator(instances=2, slots=16, block_size=SIZE)
    ledger = Ledger(allocator)
    ledger.check()
    ledger.open("a")
    prefill(ledger, "a", (0, 0, 4))
    with pytest.raises(IntegrityError, match="0 slots are in use, steps took 4"):
        ledger.check()
