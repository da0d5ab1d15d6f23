"""Random clusters, pools and loads for what policies promise.

`VirtualEngine` validates every plan, proves the allocator's books after every step, and fails
when nothing is planned while nothing is in flight.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import strategies as st

from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours
from loongjax.plan import PrefillStep, Step, Topology
from loongjax.scheduler import Policy
from tests.scheduler.virtual_engine import Job, VirtualEngine

KINDS = {"subsets": EverySubset, "neighbours": Neighbours, "slices": AlignedSlices}


@dataclass(frozen=True, kw_only=True)
class Load:
    """A request, as parts of what is possible: of the pool, of its peak, of `max_tokens`.

    `wait` steps later the next one comes; this one is aborted then, if `aborted`.
    """

    peak: float
    prompt: float
    tokens: float
    priority: int
    wait: int
    aborted: bool = False


parts = st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.8, 1.0])
loads = st.builds(
    Load, peak=parts, prompt=parts, tokens=parts, priority=st.integers(0, 1), wait=st.integers(0, 9)
)
clusters = st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 8), st.sets(st.integers(0, 7)))
pools = st.tuples(st.sampled_from([1, 4, 16]), st.sampled_from([1, 2, 5, 12]))
limits = st.tuples(st.sampled_from([4, 8, 32]), st.sampled_from([1, 2, 4]))


def topology(cluster: tuple[str, int, set[int]]) -> Topology:
    kind, instances, chosen = cluster
    possible = KINDS[kind](instances).degrees
    return KINDS[kind](instances, {possible[i % len(possible)] for i in chosen} or None)


def engine(
    cluster: tuple[str, int, set[int]],
    pool: tuple[int, int],
    policy: Policy,
    limit: tuple[int, int],
    seed: int,
    failures: float = 0.0,
    tick: float = 0.0,
) -> VirtualEngine:
    """Steps end in an order drawn from `seed`, `tick` seconds apart; that part of them fails."""
    order, luck = random.Random(seed), random.Random(seed)
    slow = order.random() < 0.3  # prefill steps take long

    def pick(steps: list[Step]) -> int:
        quick = [i for i, step in enumerate(steps) if not isinstance(step, PrefillStep)]
        return order.choice(quick if slow and quick and order.random() < 0.9 else range(len(steps)))

    block_size, blocks = pool
    return VirtualEngine(
        policy,
        topology(cluster),
        slots=blocks * block_size + block_size // 2,  # the half block is never used
        block_size=block_size,
        max_chunk_tokens=limit[0],
        max_rows=limit[1],
        pick=pick,
        fail=lambda step: luck.random() < failures,
        tick=tick,
    )


def job(it: VirtualEngine, name: str, load: Load, *, shortest_prompt: int = 1) -> Job:
    """One that fits the pool."""
    peak = max(1, round(load.peak * min(it.capacity(), 90)))
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
        if load.aborted and f"r{i}" in it.jobs:
            it.abort(f"r{i}")
    it.run()
    assert all(load.aborted or f"r{i}" in it.finished for i, load in enumerate(given_loads))


class Hoarder(VirtualEngine):
    """Whoever ends keeps its slots, so that all reach their peaks together."""

    def _forget(self, name: str) -> None:
        self.allocator.fork(name, f"{name}, ended")
        super()._forget(name)


def serve_one_that_fills_all(it: VirtualEngine, tokens: int) -> None:
    """Serves one request that needs every slot of the largest group."""
    tokens = min(tokens, it.capacity())
    prompt = it.capacity() - tokens + 1
    it.submit(Job(id="a", prompt=prompt, max_tokens=tokens, tokens=tokens))
    it.run()


def serve_until_full(
    policy: Policy, slots: int, sizes: list[tuple[int, int]], limit: tuple[int, int], seed: int
) -> VirtualEngine:
    """Serves requests that together need all slots of four instances, and keep them.

    `sizes` are prompts and answers of some; one more takes what they leave.
    """
    order = random.Random(seed)
    it = Hoarder(
        policy,
        EverySubset(4),
        slots=slots,
        block_size=1,
        max_chunk_tokens=limit[0],
        max_rows=limit[1],
        pick=lambda steps: order.randrange(len(steps)),
    )
    left = 4 * slots
    for i, (prompt, tokens) in enumerate([*sizes, (left, 1)]):
        prompt, tokens = min(prompt, left), min(tokens, left - min(prompt, left) + 1)
        if prompt:
            it.submit(Job(id=f"r{i}", prompt=prompt, max_tokens=tokens, tokens=tokens))
            left -= prompt + tokens - 1
    while it.jobs:
        it.plan()
        it.end_one()
    return it
