"""What a simulation comes to: latencies, objectives, throughput, as one JSON object.

Guards against numbers that flatter: percentiles stand beside means, every class of prompt
length is reported by itself, requests that did not end count as misses of the objective, and
the time that a run took after its last arrival is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loongjax.costmodel.protocol import ChunkWork
from loongjax.errors import ConfigError
from loongjax.simulator.bound import fluid_seconds
from loongjax.simulator.deployment import Deployment
from loongjax.simulator.jobs import CLASSES, Job, Outcome, length_class
from loongjax.simulator.run import Run

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """A service level objective of one request. The defaults are LoongServe's for Zipf lengths.

    Attributes:
      ttft_factor: Time to first token is at most so many times the predicted prefill of the
        request alone, on the largest group of the hardware's usual deployment,
      ttft_floor_s: or this [s], if that is more.
      tpot_s: Mean time from token to token [s], at most.
    """

    ttft_factor: float = 25.0
    ttft_floor_s: float = 15.0
    tpot_s: float = 0.05

    def __post_init__(self) -> None:
        for name, value in (("ttft_factor", self.ttft_factor), ("ttft_floor_s", self.ttft_floor_s)):
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"{name} must be finite and at least 0, not {value}")
        if not 0.0 < self.tpot_s < math.inf:
            raise ConfigError(f"tpot_s must be finite and above 0, not {self.tpot_s}")

    def ttft_limit(self, job: Job, deployment: Deployment) -> float:
        """The longest time to first token that is good enough [s]."""
        alone = deployment.reference.prefill(
            deployment.reference_degree, [ChunkWork(job.prompt, 0)]
        )
        return max(self.ttft_factor * alone, self.ttft_floor_s)

    def met(self, outcome: Outcome, deployment: Deployment) -> bool:
        """Whether a request was served well; one that did not end was not."""
        if outcome.ending != "completed":
            return False
        tpot = outcome.tpot
        in_time = outcome.ttft <= self.ttft_limit(outcome.job, deployment)
        return in_time and (tpot is None or tpot <= self.tpot_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attainment:
    """The part of requests that were served well: of all, and of each class that has any."""

    total: float
    by_class: dict[str, float]

    @property
    def least(self) -> float:
        """Of the class that is served worst, or of all if that is less."""
        return min(self.total, *self.by_class.values())


def attainment(run: Run, deployment: Deployment, objective: Objective) -> Attainment:
    """How well requests were served; those whose callers gave up do not count."""
    outcomes = [outcome for outcome in run.outcomes if outcome.ending != "cancelled"]
    met = [objective.met(outcome, deployment) for outcome in outcomes]
    by_class: dict[str, list[bool]] = {}
    for outcome, good in zip(outcomes, met, strict=True):
        by_class.setdefault(length_class(outcome.job.prompt), []).append(good)
    return Attainment(
        total=sum(met) / len(met) if met else 0.0,
        by_class={name: sum(values) / len(values) for name, values in by_class.items()},
    )


def report(
    run: Run, deployment: Deployment, *, policy: str, workload: str, objective: Objective
) -> dict[str, Any]:
    """The object that `loongjax simulate --json` prints; times that nobody had are None."""
    done = [outcome for outcome in run.outcomes if outcome.ending == "completed"]
    count = len(run.outcomes)
    duration = run.ended - run.started
    arrivals = run.last_arrival - run.started
    tokens = sum(outcome.job.prompt + outcome.job.output for outcome in done)
    throughput = tokens / duration if duration > 0.0 else 0.0
    served = [outcome.job for outcome in done]
    bound = tokens / fluid_seconds(served, deployment) if served else None
    good = attainment(run, deployment, objective)
    endings = [outcome.ending for outcome in run.outcomes]
    return {
        "policy": policy,
        "workload": workload,
        "hardware": deployment.name,
        "instances": deployment.instances,
        "rate": (count - 1) / arrivals if arrivals > 0.0 else None,
        "requests": count,
        "completed": len(done),
        "unfinished": endings.count("failed"),
        "rejected": endings.count("rejected"),
        "cancelled": endings.count("cancelled"),
        "normalized_ms": normalized_ms(done),
        "ttft_s": _percentiles(outcome.ttft for outcome in done),
        "tpot_s": _percentiles(outcome.tpot for outcome in done),
        "by_class": {name: _class_report(name, run, done, good) for name in CLASSES},
        "slo_attainment": good.total,
        "throughput_tokens_per_s": throughput,
        "bound_tokens_per_s": bound,
        "bound_fraction": throughput / bound if bound else None,
        "busy_fraction": run.busy_fraction,
        "duration_s": duration,
        "drain_s": run.ended - run.last_arrival,
        "steps": run.steps,
        "preemptions": run.preemptions,
        "scale_ups": run.scale_ups,
        "scale_downs": run.scale_downs,
        "migrated_bytes": run.migrated_bytes,
        "wall_s": run.wall_s,
    }


def normalized_ms(done: Sequence[Outcome]) -> dict[str, float | None]:
    """LoongServe's three latencies per token [ms], in the mean over requests: of the whole by
    all tokens, of the first token by the prompt, and of the rest by the answer.
    """
    jobs = [(outcome, outcome.job) for outcome in done]
    total = [(one.end - job.arrival) / (job.prompt + job.output) for one, job in jobs]
    tpots = [one.tpot for one in done if one.tpot is not None]
    means = {
        "total": _mean(total),
        "input": _mean([one.ttft / job.prompt for one, job in jobs]),
        "output": _mean(tpots),
    }
    return {name: None if mean is None else mean * 1e3 for name, mean in means.items()}


def _class_report(name: str, run: Run, done: Sequence[Outcome], good: Attainment) -> dict[str, Any]:
    mine = [outcome for outcome in done if length_class(outcome.job.prompt) == name]
    return {
        "requests": sum(length_class(outcome.job.prompt) == name for outcome in run.outcomes),
        "ttft_s": _percentiles(outcome.ttft for outcome in mine),
        "tpot_s": _percentiles(outcome.tpot for outcome in mine),
        "slo_attainment": good.by_class.get(name),
    }


def _percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return {f"p{p}": None for p in _PERCENTILES}
    found = np.percentile(known, _PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(_PERCENTILES, found, strict=True)}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
