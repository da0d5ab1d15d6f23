"""What `LoongServe` promises, on random clusters, pools, loads and orders of ends."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.plan import PrefillStep, RequestView, Snapshot
from loongjax.scheduler.policies.loongserve import LoongServe
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

# Tests have few tokens; costs as large as these make all of the four steps matter.
costs = st.sampled_from(
    [
        AnalyticCost(),
        AnalyticCost(token=1.0, square=1e-2, kv=0.1, row=0.1, moved=1e-6),
        AnalyticCost(token=1.0, square=0.0, kv=0.0, row=1.0, moved=1.0, hop=0.0),
    ]
)
policies = st.builds(
    LoongServe,
    cost=costs,
    headroom=st.sampled_from([None, 0, 1, 8]),
    typical_answer=st.sampled_from([1, 256]),
    migrates=st.booleans(),
    scale_up=st.booleans(),
    patience=st.sampled_from([0.0, 1e9]),
    decode_s=st.sampled_from([0.045, 0.5, 1e9]),
)


@settings(max_examples=100)
@given(
    clusters,
    pools,
    policies,
    limits,
    st.lists(st.builds(replace, loads, aborted=st.booleans()), min_size=1, max_size=10),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.0, 0.1]),
)
def test_everybody_ends_whatever_fails_or_is_aborted(
    cluster: tuple[str, int, set[int]],
    pool: tuple[int, int],
    policy: LoongServe,
    limit: tuple[int, int],
    given_loads: list[Load],
    seed: int,
    failures: float,
) -> None:
    it = engine(cluster, pool, policy, limit, seed, failures)
    serve(it, given_loads)
    for snapshot, plan in it.plans:
        assert policy.schedule(0.0, snapshot) == plan, "the same snapshot got another plan"
        holders = [view for view in (*snapshot.running, *snapshot.waiting) if view.kv]
        first = min(holders, key=line_key, default=None)
        short = first is not None and first.uncomputed > 1
        assert first is None or short or first.id not in plan.preempt
        for step in plan.steps:
            if isinstance(step, PrefillStep):
                _check_prompts_took_turns(step, snapshot)


def _check_prompts_took_turns(step: PrefillStep, snapshot: Snapshot) -> None:
    """Whoever decodes on these instances, and has room, got a token since the last prompt."""
    for view in snapshot.running:
        if view.id in snapshot.in_flight:
            continue
        for home in view.homes.intersection(step.group):
            last_prompt = snapshot.instances[home].prefill_seq
            put_off = last_prompt is not None and (view.last_seq or -1) < last_prompt
            assert not put_off or _is_short(view, snapshot)


def _is_short(view: RequestView, snapshot: Snapshot) -> bool:
    free = [snapshot.instances[home].free_slots for home in view.homes]
    return view.tail is None and not any(slots >= snapshot.block_size for slots in free)


@settings(max_examples=40)
@given(clusters, pools, costs, st.integers(1, 40), st.sampled_from([4, 256]))
def test_one_request_may_fill_the_largest_group_to_the_last_slot(
    cluster: tuple[str, int, set[int]],
    pool: tuple[int, int],
    cost: AnalyticCost,
    tokens: int,
    chunk: int,
) -> None:
    it = engine(cluster, pool, LoongServe(cost=cost, headroom=0), (chunk, 1), seed=0)
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
    policy: LoongServe,
    limit: tuple[int, int],
    seed: int,
) -> None:
    """No deadlock where requests that need all slots of four instances hold them in parts,
    and nobody has to give any up.
    """
    it = serve_until_full(replace(policy, scale_up=True), slots, sizes, limit, seed)
    assert it.fullest == 4 * slots
    assert not it.preempted
