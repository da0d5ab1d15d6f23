"""What `FirstCome` promises, on random clusters, pools, loads and orders of ends.

`VirtualEngine` validates every plan, proves the allocator's books after every step, and fails
when nothing is planned while nothing is in flight.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours
from loongjax.plan import PrefillStep, RequestView, Snapshot, Step, Topology
from loongjax.scheduler.policies.board import line_key
from loongjax.scheduler.policies.first_come import FirstCome
from tests.scheduler.virtual_engine import Job, VirtualEngine

KINDS = {"subsets": EverySubset, "neighbours": Neighbours, "slices": AlignedSlices}


@dataclass(frozen=True, kw_only=True)
class Load:
    """A request, as parts of what is possible: of the pool, of its peak, of `max_tokens`."""

    peak: float
    prompt: float
    tokens: float
    priority: int
    wait: int


parts = st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.8, 1.0])
loads = st.builds(
    Load, peak=parts, prompt=parts, tokens=parts, priority=st.integers(0, 1), wait=st.integers(0, 9)
)
clusters = st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 8), st.sets(st.integers(0, 7)))
pools = st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([1, 2, 5, 12]))
policies = st.tuples(st.sampled_from([2, 8, 1024]), st.sampled_from([0, 1, 8, 1000]))
limits = st.tuples(st.sampled_from([8, 64]), st.sampled_from([1, 2, 4]))


def topology(cluster: tuple[str, int, set[int]]) -> Topology:
    kind, instances, chosen = cluster
    possible = KINDS[kind](instances).degrees
    return KINDS[kind](instances, {possible[i % len(possible)] for i in chosen} or None)


def engine(
    cluster: tuple[str, int, set[int]],
    pool: tuple[int, int],
    policy: tuple[int, int],
    limit: tuple[int, int],
    seed: int,
) -> VirtualEngine:
    order = random.Random(seed)
    slow = order.random() < 0.3  # prefill steps take long

    def pick(steps: list[Step]) -> int:
        quick = [i for i, step in enumerate(steps) if not isinstance(step, PrefillStep)]
        return order.choice(quick if slow and quick and order.random() < 0.9 else range(len(steps)))

    block_size, blocks = pool
    return VirtualEngine(
        FirstCome(tokens_per_rank=policy[0], headroom=policy[1]),
        topology(cluster),
        slots=blocks * block_size + block_size // 2,  # the half block is never used
        block_size=block_size,
        max_chunk_tokens=limit[0],
        max_rows=limit[1],
        pick=pick,
    )


def job(it: VirtualEngine, name: str, load: Load, *, shortest_prompt: int = 1) -> Job:
    """One that fits the pool, and that can be computed anew however long it has become."""
    peak = max(1, round(load.peak * min(it.capacity(), it.longest_prefill - 1, 60)))
    prompt = max(shortest_prompt, round(load.prompt * peak))
    max_tokens = max(1, peak - prompt + 1)
    return Job(
        id=name,
        prompt=prompt,
        max_tokens=max_tokens,
        tokens=max(1, round(load.tokens * max_tokens)),
        priority=load.priority,
    )


def serve(it: VirtualEngine, given_loads: list[Load], *, shortest_prompt: int = 1) -> None:
    """Submits each request some steps after the one before, and runs until all have ended."""
    for i, load in enumerate(given_loads):
        it.submit(job(it, f"r{i}", load, shortest_prompt=shortest_prompt))
        for _ in range(load.wait):
            it.plan()
            if it.flying:
                it.end_one()
    it.run()
    assert len(it.finished) == len(given_loads)


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
    policy: tuple[int, int],
    limit: tuple[int, int],
    given_loads: list[Load],
    seed: int,
) -> None:
    it = engine(cluster, pool, policy, limit, seed)
    serve(it, given_loads)
    assert not it.lost
    for snapshot, plan in it.plans:
        line = decoding(snapshot)
        for name in plan.preempt:
            assert name != line[0].id, "the first in line was preempted"
        for step in plan.steps:
            if isinstance(step, PrefillStep):
                _check_prompts_took_turns(step, line, snapshot)


def _check_prompts_took_turns(
    step: PrefillStep, line: list[RequestView], snapshot: Snapshot
) -> None:
    """Whoever decodes on these instances got a token since the last prompt there."""
    for view in line:
        for home in view.homes.intersection(step.group):
            last_prompt = snapshot.instances[home].prefill_seq
            put_off = last_prompt is not None and view.last_seq < last_prompt
            assert not put_off or is_short(view, snapshot)


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
    it = engine(("subsets", instances, set()), pool, (8, 1000), limit, seed)
    serve(it, given_loads, shortest_prompt=2)
    assert not it.preempted


@settings(max_examples=40)
@given(clusters, pools, st.integers(1, 40))
def test_one_request_may_fill_the_largest_group_to_the_last_slot(
    cluster: tuple[str, int, set[int]], pool: tuple[int, int], tokens: int
) -> None:
    it = engine(cluster, pool, (8, 0), (256, 1), seed=0)
    tokens = min(tokens, it.capacity())
    prompt = it.capacity() - tokens + 1
    it.submit(Job(id="a", prompt=prompt, max_tokens=tokens, tokens=tokens))
    it.run()
    assert it.fullest == it.capacity()
    assert not it.preempted
