"""The fluid bound: no schedule can be faster than all work at its best degree, perfectly packed.

Each token is charged what it costs at the least, in instance-seconds: at the degree where that
is cheapest, with its share of a step's constant in the largest step that memory allows, and
nothing for host time, migration, imbalance or waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.simulator.deployment import Deployment
from loongjax.simulator.jobs import Job, Outcome


def fluid_seconds(jobs: Iterable[Job], deployment: Deployment) -> float:
    """The least time in which a deployment can serve these jobs [s], were all there at once."""
    total = sum(_prefill(job, deployment) + _decode(job, deployment) for job in jobs)
    return total / deployment.instances


def fluid_rate(jobs: Sequence[Job], deployment: Deployment) -> float:
    """The most such requests that a deployment can serve, each second."""
    return len(jobs) / fluid_seconds(jobs, deployment)


def fluid_seconds_done(outcomes: Iterable[Outcome], until: float, deployment: Deployment) -> float:
    """What was done of these jobs by a moment, as the least time that it takes [s].

    A prompt is done when its first token is there, and its answer grows evenly from then on.
    """
    total = 0.0
    for outcome in outcomes:
        if outcome.first_token is None or outcome.first_token > until:
            continue
        total += _prefill(outcome.job, deployment)
        span = outcome.end - outcome.first_token
        part = min(1.0, (until - outcome.first_token) / span) if span > 0.0 else 1.0
        total += part * _decode(outcome.job, deployment)
    return total / deployment.instances


def _prefill(job: Job, deployment: Deployment) -> float:
    """Instance-seconds of a prompt; whole, for chunks cost more. The largest step holds what
    memory holds, so a token's part of its constant is that of its slot.
    """
    cost, best = deployment.cost, float("inf")
    for degree in deployment.topology.degrees:
        constant = cost.prefill(degree, [])
        work = cost.prefill(degree, [ChunkWork(job.prompt, 0)]) - constant
        part = min(1.0, job.prompt / (degree * deployment.limits.max_chunk_tokens))
        best = min(best, degree * (work + constant * part))
    return best


def _decode(job: Job, deployment: Deployment) -> float:
    """Instance-seconds of all tokens of an answer but the first, which the prefill gives.

    Cost is linear in the KV that is held, so the mean over the answer stands for every step.
    """
    steps = job.output - 1
    if not steps:
        return 0.0
    cost, best = deployment.cost, float("inf")
    held = job.prompt + job.output / 2
    for degree in deployment.topology.degrees:
        constant = cost.decode(degree, DecodeWork(0, 0, degree, 0))
        row = cost.decode(degree, DecodeWork(degree, 0, degree, 0)) - constant  # one a master
        kv = cost.decode(degree, DecodeWork(0, round(held), degree, 0)) - constant
        part = min(1.0, held / (degree * deployment.pool_slots))
        best = min(best, row + degree * (kv + constant * part))
    return best * steps
