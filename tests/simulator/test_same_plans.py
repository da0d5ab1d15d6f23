"""Plans stay as they are when planning is only made quicker.

A digest of all plans of a small simulation. A change that decides otherwise changes it, knowingly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import pytest

from loongjax.plan import Plan, Snapshot
from loongjax.scheduler.policies import create_policy
from loongjax.scheduler.policy import Policy
from loongjax.simulator import deploy, draw_jobs, simulate


@dataclass(kw_only=True)
class Noted:
    """A policy whose plans are noted down."""

    inner: Policy
    plans: list[Plan] = field(default_factory=list)

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        self.plans.append(self.inner.schedule(now, snapshot))
        return self.plans[-1]

    def digest(self) -> str:
        made = [(p.steps, p.preempt, p.reject, sorted(p.ahead)) for p in self.plans]
        return hashlib.sha256(repr(made).encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("workload", "rate", "hardware", "slots", "expected"),
    [
        ("sharegpt", 40.0, "a800x8", None, "ca76fcc88089"),
        ("zipf:1.0", 2.0, "a800x8", None, "2d3d1ba1fe89"),
        ("sharegpt", 1000.0, "a800x32", 6000, "7c08539fefe8"),
    ],
)
def test_plans_of_a_seed(
    workload: str, rate: float, hardware: str, slots: int | None, expected: str
) -> None:
    deployment = deploy(hardware, "llama2-7b", pool_slots=slots)
    policy = Noted(inner=create_policy("loongserve", deployment.cost))
    simulate(draw_jobs(workload, 30, rate=rate, seed=3), deployment, policy)
    assert policy.digest() == expected
