"""What `Elastic` promises, on random clusters, pools, loads and orders of ends."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.scheduler.policies.elastic import Elastic
from loongjax.scheduler.policies.worktable import line_key
from tests.scheduler.analytic_cost import AnalyticCost
from tests.scheduler.loads import (
    Load,
    clusters,
    engine,
    limits,
    loads,
    pools,
    serve,
    serve_one_that_fills_all,
    serve_until_full,
)

costs = st.sampled_from(
    [
        AnalyticCost(),
        AnalyticCost(token=1e-3, square=1e-5, kv=1e-4, row=1e-3, moved=1e-6),
        AnalyticCost(token=1.0, square=1e-2, kv=0.1, row=0.1, moved=1e-6),
        AnalyticCost(token=1.0, square=0.0, kv=0.0, row=1.0, moved=1.0, hop=0.0),
    ]
)
policies = st.builds(
    Elastic,
    cost=costs,
    headroom=st.sampled_from([None, 0, 1, 8]),
    decode_s=st.sampled_from([0.045, 0.5, 1e9]),
    chunk_s=st.sampled_from([0.02, 0.3, 1e9]),
    floor_s=st.sampled_from([0.0, 0.04, 1e9]),
)
ticks = st.sampled_from([0.0, 0.01, 1.0])


@settings(max_examples=100)
@given(
    clusters,
    pools,
    policies,
    limits,
    st.lists(st.builds(replace, loads, aborted=st.booleans()), min_size=1, max_size=10),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.0, 0.1]),
    ticks,
)
def test_everybody_ends_whatever_fails_or_is_aborted(
    cluster: tuple[str, int, set[int]],
    pool: tuple[int, int],
    policy: Elastic,
    limit: tuple[int, int],
    given_loads: list[Load],
    seed: int,
    failures: float,
    tick: float,
) -> None:
    it = engine(cluster, pool, policy, limit, seed, failures, tick)
    serve(it, given_loads)
    for snapshot, plan in it.plans:
        holders = [view for view in (*snapshot.running, *snapshot.waiting) if view.kv]
        first = min(holders, key=line_key, default=None)
        short = first is not None and first.uncomputed > 1
        assert first is None or short or first.id not in plan.preempt


@settings(max_examples=40)
@given(clusters, pools, costs, st.integers(1, 40), st.sampled_from([4, 256]), ticks)
def test_one_request_may_fill_the_largest_group_to_the_last_slot(
    cluster: tuple[str, int, set[int]],
    pool: tuple[int, int],
    cost: AnalyticCost,
    tokens: int,
    chunk: int,
    tick: float,
) -> None:
    policy = Elastic(cost=cost, headroom=0)
    it = engine(cluster, pool, policy, (chunk, 1), seed=0, tick=tick)
    serve_one_that_fills_all(it, tokens)
    assert it.fullest == it.capacity()
    assert not it.preempted


@settings(max_examples=60)
@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    policies,
    limits,
    st.integers(0, 999),
)
def test_requests_fill_the_pool_to_its_last_slot(
    slots: int,
    sizes: list[tuple[int, int]],
    policy: Elastic,
    limit: tuple[int, int],
    seed: int,
) -> None:
    """No deadlock where requests that need all slots of four instances hold them in parts."""
    it = serve_until_full(policy, slots, sizes, limit, seed)
    assert it.fullest == 4 * slots
