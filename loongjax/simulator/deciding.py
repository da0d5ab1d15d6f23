"""How long a policy takes to decide, with so many requests around.

A replay on the virtual clock: many more chats than there is memory for come at once, so that
the wanted numbers wait and decode; then every plan is timed until there are enough of them. A
plan's time is that of its snapshot and of `schedule`, as the engine makes them, on a core of
this machine: what other processes take from it in between is not counted. On the virtual clock
the engine takes no time: were an estimate charged there, steps would end while it passes, and
how many a plan finds would depend on the estimate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from loongjax.costmodel.sib import HostTime
from loongjax.engine.state import State
from loongjax.errors import RequestError
from loongjax.plan import Plan, Snapshot
from loongjax.scheduler.policies import create_policy
from loongjax.scheduler.policy import Policy
from loongjax.simulator.deployment import Deployment, deploy
from loongjax.simulator.run import assemble
from loongjax.simulator.workloads import draw_jobs

_CHIPS = 2
"""Of an instance: those of the measured A800."""
_TOKENS = 1_900
"""KV that a chat is granted, about."""
_ANSWER = 500
"""Tokens of an answer, at least: where most are shorter, so many end that many instances never have
the wanted number decode."""
_MORE = 1.1
"""So many more come than are to wait: some begin while others are timed."""
_HELD = 0.8
"""A plan counts if at least this part of the wanted requests wait, and decode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deciding:
    """Times of plans.

    Attributes:
      waiting, running: Requests that did so, in the median over the plans.
      instances: How many there are.
      seconds: Of each plan, its snapshot included.
    """

    waiting: int
    running: int
    instances: int
    seconds: tuple[float, ...]

    def percentile_ms(self, percent: int) -> float:
        """Of the plans' times [ms]."""
        return float(np.percentile(self.seconds, percent)) * 1e3


def time_deciding(
    policy: str, *, waiting: int, running: int, instances: int, plans: int, seed: int = 0
) -> Deciding:
    """Times so many plans of a policy.

    Args:
      policy: See `create_policy`.
      waiting: Requests that are to wait.
      running: Requests that are to decode.
      instances: Elastic instances.
      plans: How many to time.
      seed: Of the lengths.

    Raises:
      RequestError: A number is below 1, or the policy never had so many decode.
      ConfigError: There is no such policy.
    """
    if min(waiting, running, instances, plans) < 1:
        raise RequestError(
            f"waiting, running, instances and plans must be at least 1; they are {waiting}, "
            f"{running}, {instances} and {plans}"
        )
    deployment = _deployment(running, instances)
    drawn = draw_jobs("sharegpt", round(_MORE * waiting) + running, rate=1.0, seed=seed)
    jobs = [replace(job, arrival=0.0, output=max(job.output, _ANSWER)) for job in drawn]
    timed = _Timed(
        inner=create_policy(policy, deployment.cost), waiting=waiting, running=running, plans=plans
    )
    cluster = assemble(jobs, deployment, timed, lambda **parts: _TimedState(timed, **parts))
    try:
        cluster.loop.serve()
    except _EnoughError:
        return Deciding(
            waiting=round(median(timed.waited)),
            running=round(median(timed.ran)),
            instances=instances,
            seconds=tuple(timed.seconds),
        )
    raise RequestError(
        f"only {len(timed.seconds)} plans of {policy} saw {_HELD:.0%} of {waiting} waiting and "
        f"{running} running requests on {instances} instances; ask for fewer of them"
    )


def _deployment(running: int, instances: int) -> Deployment:
    """With memory for so many chats."""
    slots = max(4_096, -(-running * _TOKENS // instances))
    host = HostTime(turn_s=0.0, step_s=0.0, row_s=0.0)
    return deploy(f"a800x{_CHIPS * instances}", "llama2-7b", pool_slots=slots, host=host)


class _EnoughError(Exception):
    """All plans were timed."""


@dataclass(kw_only=True, slots=True)
class _Timed:
    """A policy that times another one."""

    inner: Policy
    waiting: int
    running: int
    plans: int
    snapshot_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    waited: list[int] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`."""
        started = time.thread_time()
        plan = self.inner.schedule(now, snapshot)
        took = time.thread_time() - started
        waiting, running = len(snapshot.waiting), len(snapshot.running)
        if waiting >= _HELD * self.waiting and running >= _HELD * self.running:
            self.seconds.append(self.snapshot_s + took)
            self.waited.append(waiting)
            self.ran.append(running)
            if len(self.seconds) == self.plans:
                raise _EnoughError
        return plan


class _TimedState(State):
    """The engine's books; tells how long the last snapshot took."""

    def __init__(self, timed: _Timed, **parts: object) -> None:
        self._timed = timed
        super().__init__(**parts)  # type: ignore[arg-type]

    def snapshot(self) -> Snapshot:
        """See `State`."""
        started = time.thread_time()
        found = super().snapshot()
        self._timed.snapshot_s = time.thread_time() - started
        return found
