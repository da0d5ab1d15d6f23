"""Step 3 of LoongServe: the dynamic program against trying everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours
from loongjax.costmodel.protocol import ChunkWork
from loongjax.plan import Topology
from loongjax.scheduler.batching import Limits, PrefillBatch, few_degrees, split_prefill
from loongjax.scheduler.dispatch import Prompt
from tests.scheduler.analytic_cost import AnalyticCost

COST = AnalyticCost()
WIDE = Limits(tokens=1 << 30, chunks=1 << 30)


def prompts_of(lengths: Sequence[int]) -> list[Prompt]:
    """Blocks of one token, nothing to grow."""
    return [Prompt(tokens, 0, tokens) for tokens in lengths]


def value(batches: Sequence[PrefillBatch], prompts: Sequence[Prompt]) -> float:
    """The sum of input latencies per token [s/token]."""
    total = 0.0
    for batch in batches:
        tokens = [prompts[i].tokens for i in batch.prompts]
        time = COST.prefill(len(batch.group), [ChunkWork(length, 0) for length in tokens])
        total += time * sum(1 / length for length in tokens)
    return total


def ways(
    prompts: Sequence[Prompt], free: Sequence[int], topology: Topology, limits: Limits
) -> Iterator[list[PrefillBatch]]:
    """Every cut of the sorted prompts into batches, on every row of disjoint groups."""
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tokens)

    def rest(first: int, instance: int) -> Iterator[list[PrefillBatch]]:
        if first == len(order):
            yield []
            return
        for last in range(first + 1, len(order) + 1):
            batch = tuple(order[first:last])
            for start in range(instance, len(free)):
                for end in range(start + 1, len(free) + 1):
                    group = tuple(range(start, end))
                    if topology.contains(group) and holds(batch, group):
                        for others in rest(last, end):
                            yield [PrefillBatch(prompts=batch, group=group), *others]

    def holds(batch: tuple[int, ...], group: tuple[int, ...]) -> bool:
        padded = sum(-(-prompts[i].tokens // len(group)) for i in batch)
        blocks = sum(prompts[i].blocks for i in batch)
        in_step = padded <= limits.tokens and len(batch) <= limits.chunks * len(group)
        return in_step and blocks <= sum(free[i] for i in group)

    yield from rest(0, 0)


def check(
    prompts: Sequence[Prompt],
    free: Sequence[int],
    topology: Topology,
    limits: Limits = WIDE,
) -> None:
    got = split_prefill(prompts, range(len(free)), free, topology, limits, COST)
    best = min((value(way, prompts) for way in ways(prompts, free, topology, limits)), default=None)
    assert (got is None) == (best is None)
    if got is None or best is None:
        return
    assert value(got, prompts) == pytest.approx(best, rel=1e-9)
    assert sorted(i for batch in got for i in batch.prompts) == list(range(len(prompts)))
    used = [instance for batch in got for instance in batch.group]
    assert len(used) == len(set(used))
    assert list(got) in list(ways(prompts, free, topology, limits))


@pytest.mark.parametrize("instances", [1, 2, 3, 4])
def test_equals_brute_force_on_every_mix_of_up_to_six_prompts(instances: int) -> None:
    for count in range(1, 7):
        for lengths in combinations_with_replacement((20, 900, 60_000), count):
            check(prompts_of(lengths), [1 << 20] * instances, EverySubset(instances))


@settings(max_examples=150)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.sampled_from([EverySubset, Neighbours, AlignedSlices]),
    st.sampled_from([10, 40, 1000]),
    st.integers(1, 3),
)
def test_equals_brute_force_within_memory_steps_and_topology(
    lengths: list[int],
    free: list[int],
    kind: type[EverySubset | Neighbours | AlignedSlices],
    tokens: int,
    chunks: int,
) -> None:
    limits = Limits(tokens=tokens * 1000, chunks=chunks)
    prompts = [Prompt(length * 1000, 0, length) for length in lengths]
    if len(free) == 1:  # the only way is taken as it is
        limits = Limits(tokens=1 << 30, chunks=1 << 30)
    check(prompts, free, kind(len(free)), limits)


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    lengths = [100_000, 10, 12, 14]
    got = split_prefill(prompts_of(lengths), range(2), [1 << 20] * 2, EverySubset(2), WIDE, COST)
    assert got is not None
    assert [batch.prompts for batch in got] == [(1, 2, 3), (0,)]


def test_many_prompts_are_bundled_and_none_is_lost() -> None:
    prompts = prompts_of([10 + i % 700 for i in range(500)])
    got = split_prefill(prompts, range(8), [1 << 20] * 8, EverySubset(8), WIDE, COST)
    assert got is not None
    assert sorted(i for batch in got for i in batch.prompts) == list(range(500))


def test_there_may_be_no_way() -> None:
    topology = EverySubset(2)
    assert split_prefill(prompts_of([50]), [0, 1], [20, 20], topology, WIDE, COST) is None
    assert split_prefill(prompts_of([50]), [0], [20], topology, WIDE, COST) is None


@pytest.mark.parametrize("count", [1, 8, 9, 64, 256])
def test_few_degrees_keep_the_ends(count: int) -> None:
    few = few_degrees(range(1, count + 1))
    assert len(few) <= 8
    assert few[0] == 1
    assert few[-1] == count
    assert list(few) == sorted(set(few))
