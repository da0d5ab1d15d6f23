"""Step 2 of LoongServe: which instances prompts get."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours
from loongjax.costmodel.protocol import ChunkWork
from loongjax.scheduler.allocate import Candidate, Demand, allocate
from loongjax.scheduler.batching import Limits
from loongjax.scheduler.dispatch import Prompt
from tests.scheduler.analytic_cost import AnalyticCost

COST = AnalyticCost()
WIDE = Limits(tokens=1 << 30, chunks=1 << 30)
ROOM = 1_000_000


def candidate(
    instance: int,
    *,
    free: int = ROOM,
    wait: float = 0.0,
    paused: float = 0.0,
    moved: int | None = 0,
) -> Candidate:
    return Candidate(
        instance=instance, free=free, blocks=ROOM, wait=wait, paused=paused, moved=moved
    )


def demand(*lengths: int, behind: float = 0.0, elsewhere: int = 0) -> Demand:
    prompts = [Prompt(tokens, 0, tokens) for tokens in lengths]
    return Demand(prompts=prompts, behind=behind, elsewhere=elsewhere)


def totals(wanted: Demand, members: Sequence[Candidate], room: int) -> Iterator[float]:
    """The formula of the module, for one group: decodes paused, then migrated."""
    time = COST.prefill(len(members), [ChunkWork(prompt.tokens, 0) for prompt in wanted.prompts])
    inputs = sum(1 / prompt.tokens for prompt in wanted.prompts)
    blocks = sum(prompt.blocks for prompt in wanted.prompts)
    wait = max(member.wait for member in members)
    paused = sum(member.paused for member in members)
    busy = [member for member in members if member.paused]
    if sum(member.free for member in members) >= blocks:
        yield time * (inputs + paused) + wait * (inputs + wanted.behind)
    moved = [member.moved for member in busy]
    given = sum(member.blocks - member.free for member in busy)
    cleared = sum(member.blocks if member.paused else member.free for member in members)
    elsewhere = wanted.elsewhere + room - sum(member.free for member in members)
    if busy and None not in moved and given <= elsewhere and cleared >= blocks:
        moving = COST.migrate(sum(tokens or 0 for tokens in moved))
        yield time * inputs + (wait + moving) * (inputs + wanted.behind) + moving * paused


busyness = st.one_of(
    st.tuples(st.just(0.0), st.just(0)),
    st.tuples(
        st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]), st.sampled_from([None, 100, 20_000, 400_000])
    ),
)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(busyness, st.sampled_from([0.0, 0.02, 0.5])), min_size=1, max_size=4),
    st.lists(st.sampled_from([30, 3_000, 90_000]), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.01, 1.0]),
)
def test_takes_the_group_with_the_lowest_total(
    cluster: list[tuple[tuple[float, int | None], float]], lengths: list[int], behind: float
) -> None:
    """Equals trying every subset, if decodes that cost more to pause do not cost less to move:
    otherwise rankings are a good guess, and never promise a total that is not there.
    """
    candidates = [
        candidate(i, free=ROOM - (moved or 0), wait=wait, paused=paused, moved=moved)
        for i, ((paused, moved), wait) in enumerate(cluster)
    ]
    wanted = demand(*lengths, behind=behind, elsewhere=4 * ROOM)
    got = allocate(wanted, candidates, EverySubset(len(candidates)), WIDE, COST)
    room = sum(each.free for each in candidates)
    every = {
        tuple(member.instance for member in members): list(totals(wanted, members, room))
        for size in range(1, len(candidates) + 1)
        for members in combinations(candidates, size)
    }
    assert got is not None
    assert got.total in [pytest.approx(total) for total in every[got.group]]
    orders = [
        sorted(range(len(candidates)), key=key)
        for key in (
            lambda i: candidates[i].paused,
            lambda i: float("inf") if candidates[i].moved is None else candidates[i].moved or 0.0,
        )
    ]
    if orders[0] == orders[1]:
        assert got.total == pytest.approx(min(min(found) for found in every.values() if found))


def test_idle_instances_come_first() -> None:
    candidates = [candidate(0, paused=0.5, moved=None), candidate(1), candidate(2)]
    got = allocate(demand(20_000), candidates, EverySubset(3), WIDE, COST)
    assert got is not None
    assert (got.group, got.migrate) == ((1, 2), ())


def test_short_prompt_takes_few_instances_and_a_long_one_all() -> None:
    candidates = [candidate(i) for i in range(4)]
    degrees = []
    for tokens in (50, 200_000):
        got = allocate(demand(tokens), candidates, EverySubset(4), WIDE, COST)
        assert got is not None
        degrees.append(len(got.group))
    assert degrees == [1, 4]


def test_decodes_move_away_where_that_is_cheaper_than_to_pause_them() -> None:
    candidates = [candidate(0, free=ROOM - 500, paused=0.05, moved=500), candidate(1)]
    got = allocate(demand(400_000), candidates, EverySubset(2), WIDE, COST)
    assert got is not None
    assert (got.group, got.migrate) == ((1,), ())  # there is no room elsewhere
    wanted = demand(400_000, elsewhere=500)
    got = allocate(wanted, candidates, EverySubset(2), WIDE, COST)
    assert got is not None
    assert (got.group, got.migrate) == ((0, 1), (0,))


@pytest.mark.parametrize(("behind", "group"), [(0.0, (0, 1)), (10.0, (0,))])
def test_waiting_for_an_instance_delays_those_behind_too(
    behind: float, group: tuple[int, ...]
) -> None:
    candidates = [candidate(0), candidate(1, wait=0.1)]
    got = allocate(demand(50_000, behind=behind), candidates, EverySubset(2), WIDE, COST)
    assert got is not None
    assert got.group == group


def test_memory_takes_more_instances_than_time_would() -> None:
    candidates = [candidate(i, free=40) for i in range(4)]
    got = allocate(demand(100), candidates, EverySubset(4), WIDE, COST)
    assert got is not None
    assert len(got.group) == 3
    assert allocate(demand(161), candidates, EverySubset(4), WIDE, COST) is None


@pytest.mark.parametrize("kind", [Neighbours, AlignedSlices])
def test_only_groups_that_exist(kind: type[Neighbours | AlignedSlices]) -> None:
    """The best two are 0 and 3; neighbours of either are tried."""
    topology = kind(8)
    busy = [candidate(i, paused=0.0 if i in (0, 3) else 0.001, moved=None) for i in range(8)]
    got = allocate(demand(9_000), busy, topology, Limits(tokens=5_000, chunks=9), COST)
    assert got is not None
    assert topology.contains(got.group)
    assert not {0, 3}.isdisjoint(got.group)
