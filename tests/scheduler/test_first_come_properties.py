"""What `FirstCome` promises, on random clusters, pools, loads and orders of ends."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.cluster.topology import EverySubset
from loongjax.plan import (
    MigrateStep,
    PrefillStep,
    RequestView,
    Snapshot,
    step_requests,
)
from loongjax.scheduler.policies.board import line_key
from loongjax.scheduler.policies.first_come import FirstCome
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
from tests.scheduler.virtual_engine import Job, VirtualEngine

policies = st.builds(
    FirstCome,
    tokens_per_rank=st.sampled_from([2, 8, 1024]),
    headroom=st.sampled_from([0, 1, 8, 1000]),
)


def is_short(view: RequestView, snapshot: Snapshot) -> bool:
    """It has no room on its instances."""
    free = [snapshot.instances[home].free_slots for home in view.homes]
    return view.tail is None and not any(slots >= snapshot.block_size for slots in free)


def decoding(snapshot: Snapshot) -> list[RequestView]:
    views = [view for view in snapshot.running if view.id not in snapshot.in_flight]
    return sorted(views, key=line_key)


@settings(max_examples=120)
@given(
    clusters, pools, policies, limits, st.lists(loads, min_size=1, max_size=10), st.integers(0, 999)
)
def test_everybody_ends_and_nobody_is_put_off_twice(
    cluster: tuple[str, int, set[int]],
    pool: tuple[int, int],
    policy: FirstCome,
    limit: tuple[int, int],
    given_loads: list[Load],
    seed: int,
) -> None:
    it = engine(cluster, pool, policy, limit, seed)
    serve(it, given_loads)
    for snapshot, plan in it.plans:
        line, holders = decoding(snapshot), [*snapshot.running, *snapshot.waiting]
        assert not any(view.holes for view in holders), "slots are wasted"
        first = min((view for view in holders if view.kv), key=line_key, default=None)
        assert first is None or first.id not in plan.preempt, "the first in line was preempted"
        for step in plan.steps:
            if isinstance(step, PrefillStep):
                _check_prompts_took_turns(step, line, snapshot)
            elif isinstance(step, MigrateStep):
                _check_moves_are_cheap(step, snapshot)


def _check_prompts_took_turns(
    step: PrefillStep, line: list[RequestView], snapshot: Snapshot
) -> None:
    """Whoever decodes on these instances got a token since the last prompt there."""
    for view in line:
        for home in view.homes.intersection(step.group):
            last_prompt = snapshot.instances[home].prefill_seq
            put_off = last_prompt is not None and view.last_seq < last_prompt
            assert not put_off or is_short(view, snapshot)


def _check_moves_are_cheap(step: MigrateStep, snapshot: Snapshot) -> None:
    """They bring requests onto fewer of their instances, for less than is to be gained."""
    views = {view.id: view for view in snapshot.running}
    held_up = sum(view.uncomputed for view in snapshot.waiting)
    for name in step_requests(step):
        moves = [move for move in step.moves if move.request == name]
        assert {move.target for move in moves} <= views[name].homes
        for move in moves:
            assert move.tokens == dict(views[name].kv)[move.source]
        tokens = sum(move.tokens for move in moves)
        assert tokens < max(held_up, views[name].peak - views[name].computed)


@settings(max_examples=60)
@given(
    clusters,
    pools,
    policies,
    limits,
    st.lists(st.builds(replace, loads, aborted=st.booleans()), min_size=1, max_size=10),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.05, 0.2]),
)
def test_everybody_ends_whatever_fails_or_is_aborted(
    cluster: tuple[str, int, set[int]],
    pool: tuple[int, int],
    policy: FirstCome,
    limit: tuple[int, int],
    given_loads: list[Load],
    seed: int,
    failures: float,
) -> None:
    serve(engine(cluster, pool, policy, limit, seed, failures), given_loads)


@settings(max_examples=30)
@given(
    st.integers(1, 5), pools, limits, st.lists(loads, min_size=2, max_size=8), st.integers(0, 999)
)
def test_with_enough_headroom_nobody_is_preempted(
    instances: int,
    pool: tuple[int, int],
    limit: tuple[int, int],
    given_loads: list[Load],
    seed: int,
) -> None:
    """Where all instances may work together, what is granted in advance can be had."""
    if instances * pool[0] * pool[1] < 2:
        return
    it = engine(
        ("subsets", instances, set()),
        pool,
        FirstCome(tokens_per_rank=8, headroom=1000),
        limit,
        seed,
    )
    serve(it, given_loads, shortest_prompt=2)
    assert not it.preempted


@settings(max_examples=40)
@given(clusters, pools, st.integers(1, 40), st.sampled_from([4, 256]))
def test_one_request_may_fill_the_largest_group_to_the_last_slot(
    cluster: tuple[str, int, set[int]], pool: tuple[int, int], tokens: int, chunk: int
) -> None:
    it = engine(cluster, pool, FirstCome(tokens_per_rank=8, headroom=0), (chunk, 1), seed=0)
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
    policy: FirstCome,
    limit: tuple[int, int],
    seed: int,
) -> None:
    """Requests that need all slots of four instances together get them, wherever these are:
    nobody is turned away or preempted, and nobody waits for memory while any is free.
    """
    it = serve_until_full(policy, slots, sizes, limit, seed)
    assert not it.preempted
    assert it.fullest == 4 * slots
    for snapshot, plan in it.plans:
        if snapshot.waiting and not snapshot.in_flight and not _owe_tokens(snapshot):
            assert any(isinstance(step, PrefillStep) for step in plan.steps)


def _owe_tokens(snapshot: Snapshot) -> bool:
    """Somebody decodes before the next prompt: put off by the last one, or without room."""
    prompts = {view.id: view.prefill_seq for view in snapshot.instances}
    put_off = any(
        (prompts[home] or -1) > view.last_seq for view in snapshot.running for home in view.homes
    )
    return put_off or any(is_short(view, snapshot) for view in snapshot.running)


def busy_run(seed: int) -> VirtualEngine:
    """Requests of like size on four instances that are nearly full."""
    order = random.Random(seed)
    it = VirtualEngine(
        FirstCome(tokens_per_rank=8, headroom=4),
        EverySubset(4),
        slots=24,
        block_size=order.choice([1, 4]),
        max_chunk_tokens=order.choice([4, 8, 32]),
        pick=lambda steps: order.randrange(len(steps)),
        fail=lambda step: order.random() < 0.02,
    )
    for i in range(10):
        prompt, tokens = order.randint(2, 16), order.randint(2, 24)
        it.submit(Job(id=f"r{i}", prompt=prompt, max_tokens=tokens, tokens=tokens))
        for _ in range(order.randint(0, 4)):
            it.plan()
            if it.flying:
                it.end_one()
    it.run()
    return it


def test_kv_comes_together_in_busy_runs() -> None:
    runs = [busy_run(seed) for seed in range(12)]
    moved = [tokens for it in runs for tokens in it.moved]
    assert sum(bool(it.moved) for it in runs) >= 4
    assert max(moved) < 24
    for it in runs:
        for snapshot, plan in it.plans:
            for step in plan.steps:
                if isinstance(step, MigrateStep):
                    _check_moves_are_cheap(step, snapshot)
