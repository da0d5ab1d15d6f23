"""A `VirtualEngine` under `FirstCome`, and what tests do with it."""

from __future__ import annotations

from loongjax.cluster.topology import EverySubset
from loongjax.plan import Chunk, Topology
from loongjax.scheduler.policies.first_come import FirstCome
from tests.scheduler.virtual_engine import Job, VirtualEngine, prefills


def engine(
    topology: Topology | int = 4,
    *,
    slots: int = 256,
    block_size: int = 1,
    tokens_per_rank: int = 16,
    headroom: int = 256,
    **limits: object,
) -> VirtualEngine:
    return VirtualEngine(
        FirstCome(tokens_per_rank=tokens_per_rank, headroom=headroom),
        EverySubset(topology) if isinstance(topology, int) else topology,
        slots=slots,
        block_size=block_size,
        **limits,
    )


def submit(
    it: VirtualEngine, name: str, prompt: int, tokens: int = 100, *, priority: int = 0
) -> None:
    it.submit(Job(id=name, prompt=prompt, max_tokens=tokens, tokens=tokens, priority=priority))


def begin(it: VirtualEngine, *names: str) -> None:
    """Plans until these have their first token, and nothing is in flight."""
    while not all(it.jobs[name].generated for name in names) or it.flying:
        if not it.flying:
            it.plan()
        it.end_one()


def chunks(it: VirtualEngine, name: str) -> list[Chunk]:
    """All that were planned of a request."""
    steps = [step for _, plan in it.plans for step in prefills(plan.steps)]
    return [chunk for step in steps for chunk in step.chunks if chunk.request == name]


def homes(it: VirtualEngine, name: str) -> tuple[int, ...]:
    return tuple(share.instance for share in it.allocator.shares(name))


def run_until(it: VirtualEngine, name: str, generated: int) -> None:
    while it.jobs[name].generated < generated:
        it.plan()
        it.end_one()
