"""A job: one request as the simulator knows it, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from loongjax.errors import RequestError
from loongjax.plan import RequestId

LengthClass: TypeAlias = Literal["<4k", "4k-32k", "32k-128k", ">128k"]
CLASSES: dict[LengthClass, int | None] = {
    "<4k": 4 * 1024,
    "4k-32k": 32 * 1024,
    "32k-128k": 128 * 1024,
    ">128k": None,
}
"""Classes of prompt length: the tokens that each stays below; None: no limit."""

Ending: TypeAlias = Literal["completed", "cancelled", "rejected", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request: what it asks for, and what it will turn out to need.

    Attributes:
      id: Unique in its workload.
      arrival: When it comes [s].
      prompt: Tokens of its prompt.
      output: Tokens after which its answer ends. Only the simulated model knows.
      limit: `max_tokens`, which the scheduler sees; at least `output`.
      cancel_after: How long its caller waits [s]; None: for ever.
    """

    id: RequestId
    arrival: float
    prompt: int
    output: int
    limit: int
    cancel_after: float | None = None

    def __post_init__(self) -> None:
        if self.prompt < 1 or not 1 <= self.output <= self.limit or not self.arrival >= 0.0:
            raise RequestError(
                f"job {self.id!r} has prompt {self.prompt}, output {self.output}, limit "
                f"{self.limit}, arrival {self.arrival}; lengths must be at least 1, the output "
                "at most the limit, and the arrival not negative"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a job.

    Attributes:
      job: What came in.
      ending: `completed`: all its tokens came; `cancelled`: its caller gave up; `rejected`: it
        was turned away before it ran; `failed`: it was begun and given up.
      first_token: When its first token was there [s], if ever.
      end: When it ended [s].
      error: Why it was rejected or failed.
    """

    job: Job
    ending: Ending
    first_token: float | None
    end: float
    error: str | None = None

    @property
    def ttft(self) -> float:
        """From arrival to the first token [s]; infinite if there was none."""
        return float("inf") if self.first_token is None else self.first_token - self.job.arrival

    @property
    def tpot(self) -> float | None:
        """From one token to the next, in the mean [s]; None for a single token."""
        if self.first_token is None or self.job.output < 2:
            return None
        return (self.end - self.first_token) / (self.job.output - 1)


def length_class(prompt: int) -> LengthClass:
    """The class of a prompt of so many tokens."""
    return next(name for name, limit in CLASSES.items() if limit is None or prompt < limit)


def at_rate(jobs: Sequence[Job], rate: float) -> list[Job]:
    """The same jobs with their arrivals stretched, to come at `rate` a second in the mean.

    Raises:
      RequestError: They all come at once, or the rate is not positive.
    """
    span = jobs[-1].arrival - jobs[0].arrival if jobs else 0.0
    if len(jobs) < 2 or span <= 0.0 or not 0.0 < rate < math.inf:
        raise RequestError(
            f"{len(jobs)} jobs within {span} s cannot be brought to {rate} a second; it takes "
            "two at different times, and a positive, finite rate"
        )
    factor = (len(jobs) - 1) / span / rate
    first = jobs[0].arrival
    return [replace(job, arrival=(job.arrival - first) * factor) for job in jobs]
