"""A policy whose cost model learns from the steps that it planned, while it serves.

Once in a while the steps of a plan are foretold, and what they took corrects the cost model
(`costmodel/correction.py`), within its bounds. So the policy stays a pure function of snapshot
and cost model; only the latter remembers. Steps that go on by themselves are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

from loongjax.costmodel.correction import CorrectedCost, CostKind
from loongjax.costmodel.steps import step_seconds
from loongjax.plan import (
    DecodeStep,
    InstanceId,
    Plan,
    PrefillStep,
    RequestId,
    Snapshot,
    Step,
    StepResult,
)
from loongjax.scheduler.policy import Policy

_PERIOD_S = 0.25
"""How often a plan's steps are foretold: it takes a look at every request."""


class Learning:
    """See the module.

    Attributes:
      inner: The policy, which asks `cost`.
      cost: What learns.
    """

    def __init__(self, inner: Policy, cost: CorrectedCost) -> None:
        self.inner = inner
        self.cost = cost
        self._last: float | None = None
        self._expected: dict[int, tuple[CostKind, int, float]] = {}

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`."""
        plan = self.inner.schedule(now, snapshot)
        due = self._last is None or now - self._last >= _PERIOD_S
        if due and plan.steps and not plan.preempt:
            self._last = now
            held = _Held(snapshot)
            self._expected = {
                step.seq: (*_kind(step), step_seconds(step, held, self.cost)) for step in plan.steps
            }
        return plan

    def observe(self, result: StepResult) -> None:
        """A step ended."""
        expected = self._expected.pop(result.seq, None)
        if expected is not None and result.error is None:
            kind, degree, seconds = expected
            measured = result.ended - result.started
            self.cost.observe(kind, degree, predicted=seconds, measured=measured)


class _Held:
    """Where KV lies, as a snapshot shows it."""

    def __init__(self, snapshot: Snapshot) -> None:
        views = (*snapshot.running, *snapshot.waiting)
        self._kv = {view.id: view.kv for view in views}

    def tokens(self, request: RequestId) -> Mapping[InstanceId, int]:
        """KV tokens of a request by instance."""
        return dict(self._kv[request])


def _kind(step: Step) -> tuple[CostKind, int]:
    """What a step is, and the degree under which that is learned."""
    if isinstance(step, PrefillStep):
        return "prefill", len(step.group)
    return ("decode", len(step.group)) if isinstance(step, DecodeStep) else ("migrate", 1)
