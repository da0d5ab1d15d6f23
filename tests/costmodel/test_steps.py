"""What a step is charged: the slowest rank decides, and nothing moves for free."""

from __future__ import annotations

import pytest

from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.costmodel.steps import decode_work, step_seconds
from loongjax.kvcache import BlockAllocator
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
from tests.costmodel.sibs import toy_sib

COST = toy_sib()


def prefill(name: str, start: int, shares: dict[int, int], group=(0, 1)) -> PrefillStep:
    kept = tuple(Share(i, tokens) for i, tokens in shares.items())
    length = sum(shares.values())
    return PrefillStep(
        seq=0,
        group=group,
        chunks=(Chunk(request=name, start=start, length=length, last=True),),
        keep=(Placement(request=name, shares=kept),),
    )


def pool(**held: dict[int, int]) -> Ledger:
    """A ledger of requests that hold so many tokens on each instance."""
    allocator = BlockAllocator(instances=4, slots=100_000, block_size=4)
    ledger = Ledger(allocator)
    for name, shares in held.items():
        ledger.open(name)
        step = prefill(name, 0, shares, group=(0, 1, 2, 3))
        ledger.apply(step, allocator.apply(step))
    return ledger


def decode(group: tuple[int, ...], *rows: tuple[str, int, int]) -> DecodeStep:
    return DecodeStep(seq=1, group=group, rows=tuple(DecodeRow(*row) for row in rows))


def test_kv_that_lies_evenly_is_charged_as_it_is():
    ledger = pool(a={0: 100, 1: 100}, b={0: 40, 1: 39})
    work = decode_work(decode((0, 1), ("a", 0, 1), ("b", 1, 1)), ledger)
    assert work == DecodeWork(rows=2, kv_tokens=2 * 141, masters=2, longest=200)


def test_kv_on_one_rank_is_charged_as_if_all_had_as_much():
    ledger = pool(a={0: 200})
    alone = decode_work(decode((0,), ("a", 0, 0)), ledger)
    wide = decode_work(decode((0, 1, 2, 3), ("a", 0, 1)), ledger)
    assert alone == DecodeWork(rows=1, kv_tokens=201, masters=1, longest=200)
    assert wide == DecodeWork(rows=1, kv_tokens=800, masters=1, longest=800)
    assert COST.decode(4, wide) > COST.decode(1, alone) - 0.001


def test_the_busiest_master_decides():
    ledger = pool(a={0: 8}, b={0: 8}, c={0: 8}, d={1: 8})
    rows = [("a", 0, 0), ("b", 0, 0), ("c", 0, 0), ("d", 1, 1)]
    work = decode_work(decode((0, 1), *rows), ledger)
    assert (work.rows, work.masters) == (6, 2)


def test_a_prefill_is_charged_alike_wherever_its_kv_is_kept():
    ledger = pool()
    ledger.open("a")
    spread = step_seconds(prefill("a", 0, {0: 500, 1: 500}), ledger, COST)
    shrunk = step_seconds(prefill("a", 0, {1: 1_000}), ledger, COST)
    assert spread == shrunk == COST.prefill(2, [ChunkWork(1_000, 0)])


def test_history_is_charged_and_more_so_where_it_lies_on_one_rank():
    even, uneven = pool(a={0: 5_000, 1: 5_000}), pool(a={0: 10_000})
    chunk = prefill("a", 10_000, {0: 100})
    fresh = COST.prefill(2, [ChunkWork(100, 0)])
    balanced = step_seconds(chunk, even, COST)
    assert balanced == COST.prefill(2, [ChunkWork(100, 10_000)]) != fresh
    assert step_seconds(chunk, uneven, COST) == COST.prefill(2, [ChunkWork(100, 20_000)])


def test_history_is_gathered_where_that_is_cheaper_but_not_for_free():
    uneven = pool(a={0: 20_000})
    chunk = prefill("a", 20_000, {0: 4_000})
    gathered = COST.prefill(2, [ChunkWork(4_000, 20_000)]) + COST.migrate(20_000)
    assert gathered < COST.prefill(2, [ChunkWork(4_000, 40_000)])
    assert step_seconds(chunk, uneven, COST) == gathered


def test_moves_take_as_long_as_the_busiest_instance():
    moves = (Move("a", 0, 1, 100), Move("b", 2, 1, 200), Move("c", 1, 0, 250))
    step = MigrateStep(seq=3, group=(0, 1, 2), moves=moves)
    assert step_seconds(step, pool(), COST) == pytest.approx(COST.migrate(300))
