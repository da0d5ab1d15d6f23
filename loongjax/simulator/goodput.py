"""The rate that a policy sustains: a search over rates, with runs that cannot cheat.

Every run lasts equally long, whatever its rate: a short run at a high rate would end before
its backlog hurts anybody. The duration is that of all jobs at the fluid bound, which no policy
exceeds; at a lower rate the same jobs come later, and only those within the duration.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loongjax.errors import RequestError
from loongjax.plan import InstanceId
from loongjax.scheduler.policy import Policy
from loongjax.simulator.bound import fluid_rate, fluid_seconds_done
from loongjax.simulator.deployment import Deployment
from loongjax.simulator.jobs import Job, at_rate
from loongjax.simulator.metrics import Attainment, Objective, attainment
from loongjax.simulator.run import Run, simulate

_log = logging.getLogger(__name__)

_WANTED = 0.9
_FEWEST = 20
_AROUND = (0, 1, -1, 2, -2, 4, -4)
"""Steps from where a result may lie, in the order in which they are tried."""
_JUST = 1.001


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One run of the search.

    Attributes:
      rate: Requests a second that came.
      requests: How many.
      attained: How well they were served.
      work_rate: What was served meanwhile; see `work_rate`.
    """

    rate: float
    requests: int
    attained: Attainment
    work_rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Rates [requests/s].

    Attributes:
      paper: The highest at which 90 % of all requests meet the objective.
      every_class: At which that holds in every class of prompt length, too.
      sustainable: The latter, but no more than what is served under saturation: what comes
        faster only builds a backlog.
      saturated: What is served, by the work done, when requests come at the fluid bound.
      bound: The fluid bound.
      probes: The runs, by rate.
    """

    paper: float
    every_class: float
    sustainable: float
    saturated: float
    bound: float
    probes: tuple[Probe, ...]


def find_goodput(
    jobs: Sequence[Job],
    deployment: Deployment,
    policy: Policy,
    objective: Objective,
    *,
    precision: float = 0.02,
    near: Sequence[float] = (),
    drains: Sequence[tuple[float, InstanceId]] = (),
) -> Goodput:
    """Searches by bisection.

    Args:
      jobs: A workload; their spacing is kept, and stretched to each rate.
      deployment: What serves them.
      policy: How.
      objective: What is good enough.
      precision: Of the result, as a part of the fluid bound.
      near: What the results may be, as parts of the fluid bound, such as those of another seed:
        rates around these are tried first, which saves half of the runs if that is right.
      drains: Of each run; see `simulate`.

    Raises:
      RequestError: Fewer than 20 jobs, or all at once.
    """
    search = _Search(jobs, deployment, policy, objective, drains)
    step = precision * search.bound
    around = [part * search.bound + count * step for count in _AROUND for part in near]
    saturated = search.probe(search.bound).work_rate
    paper = search.bisect(search.bound, step, around, lambda probe: probe.attained.total)
    every_class = search.bisect(paper, step, around, lambda probe: probe.attained.least)
    return Goodput(
        paper=paper,
        every_class=every_class,
        sustainable=min(every_class, saturated),
        saturated=saturated,
        bound=search.bound,
        probes=tuple(sorted(search.probes.values(), key=lambda probe: probe.rate)),
    )


class _Search:
    """Runs at rates, each once."""

    def __init__(
        self,
        jobs: Sequence[Job],
        deployment: Deployment,
        policy: Policy,
        objective: Objective,
        drains: Sequence[tuple[float, InstanceId]],
    ) -> None:
        if len(jobs) < _FEWEST:
            raise RequestError(
                f"{len(jobs)} requests say nothing of 90 % of them; search with at least {_FEWEST}"
            )
        self._deployment = deployment
        self._policy = policy
        self._objective = objective
        self._drains = drains
        self._jobs = at_rate(jobs, 1.0)
        self.bound = fluid_rate(jobs, deployment)
        self._duration = len(jobs) / self.bound
        self.probes: dict[float, Probe] = {}

    def probe(self, rate: float) -> Probe:
        """Runs the jobs that come within the duration at this rate."""
        if rate not in self.probes:
            count = min(len(self._jobs), max(_FEWEST, math.ceil(rate * self._duration)))
            jobs = at_rate(self._jobs[:count], rate)
            run = simulate(jobs, self._deployment, self._policy, self._drains)
            self.probes[rate] = probe = Probe(
                rate=rate,
                requests=count,
                attained=attainment(run, self._deployment, self._objective),
                work_rate=work_rate(run, self._deployment, self.bound),
            )
            _log.info(
                "rate %.3f/s: %.1f %% meet the objective, %.1f %% in the worst class; %d "
                "requests in %.1f s",
                rate,
                100 * probe.attained.total,
                100 * probe.attained.least,
                count,
                run.wall_s,
            )
        return self.probes[rate]

    def bisect(
        self,
        highest: float,
        step: float,
        around: Sequence[float],
        attained: Callable[[Probe], float],
    ) -> float:
        """The highest rate known to pass, at most `highest`; 0 if none of those tried does.

        The next higher one that failed is at most a `step` away. Those `around` which it may lie
        are tried before others, and what earlier searches tried narrows this one.
        """
        if highest <= 0.0:
            return 0.0
        if attained(self.probe(highest)) >= _WANTED:
            return highest
        tried = [probe for probe in self.probes.values() if probe.rate <= highest]
        failed = min(probe.rate for probe in tried if attained(probe) < _WANTED)
        passed = [p.rate for p in tried if attained(p) >= _WANTED and p.rate < failed]
        low, high = max(passed, default=0.0), failed
        while high - low > _JUST * step:
            likely = (rate for rate in around if low + step / 2 < rate < high - step / 2)
            middle = next(likely, (low + high) / 2)
            if attained(self.probe(middle)) >= _WANTED:
                low = middle
            else:
                high = middle
        return low


def work_rate(run: Run, deployment: Deployment, bound: float) -> float:
    """The work that was done, as the rate of such requests that it would serve [requests/s].

    In the second half of the time in which requests come: before, work has yet to build up, and
    what is left at the end keeps few instances busy. `bound` is the fluid bound.
    """
    end = run.last_arrival
    middle = (run.started + end) / 2
    before, all_done = (
        fluid_seconds_done(run.outcomes, until, deployment) for until in (middle, end)
    )
    return bound * (all_done - before) / (end - middle)
