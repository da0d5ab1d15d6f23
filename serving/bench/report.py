"""What a load amounted to: percentiles, rates, and goodput under an objective."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loongjax.errors import ConfigError
from serving.bench.load import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What a request has to meet to be served well: both, where it has them [s]."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")

    def met(self, outcome: Outcome) -> bool:
        """Whether a request was served well."""
        if outcome.error is not None or outcome.ttft_s is None or outcome.ttft_s > self.ttft_s:
            return False
        return outcome.tpot_s is None or outcome.tpot_s <= self.tpot_s


def summarize(
    outcomes: Sequence[Outcome], duration_s: float, objective: Objective
) -> dict[str, Any]:
    """The figures of one run, as they stand in the JSON."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    good = sum(map(objective.met, outcomes))
    errors = sorted({outcome.error for outcome in outcomes if outcome.error is not None})
    return {
        "requests": len(outcomes),
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "errors": errors[:3],
        "duration_s": round(duration_s, 3),
        "requests_per_s": round(len(done) / duration_s, 3),
        "output_tokens_per_s": round(sum(each.tokens for each in outcomes) / duration_s, 1),
        "ttft_s": percentiles([each.ttft_s for each in done]),
        "tpot_s": percentiles([each.tpot_s for each in done]),
        "total_s": percentiles([each.total_s for each in done]),
        "slo_attainment": round(good / len(outcomes), 4),
        "goodput_per_s": round(good / duration_s, 3),
    }


def percentiles(values: Sequence[float | None]) -> dict[str, float | None]:
    """Median, 90th and 99th percentile of those that are there; null without any."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return {"p50": None, "p90": None, "p99": None}
    if len(known) == 1:
        known *= 2
    cuts = statistics.quantiles(known, n=100, method="inclusive")
    return {name: round(cuts[at], 6) for name, at in (("p50", 49), ("p90", 89), ("p99", 98))}
