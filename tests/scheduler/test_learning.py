"""A serving policy's cost model follows what steps really take, within its bounds."""

from __future__ import annotations

import pytest

from loongjax.cluster.topology import EverySubset
from loongjax.costmodel import ChunkWork, CorrectedCost
from loongjax.plan import InstanceView, PrefillStep, RequestView, Snapshot, StepResult
from loongjax.scheduler.learning import Learning
from loongjax.scheduler.policies import create_policy
from tests.costmodel.sibs import toy_sib


def snapshot() -> Snapshot:
    return Snapshot(
        version=0,
        next_seq=7,
        block_size=1,
        max_chunk_tokens=1_000,
        max_rows=8,
        waiting=(RequestView(id="a", prompt=400, max_tokens=9, arrival=0.0),),
        running=(),
        instances=(InstanceView(id=0, slots=1_000, free_slots=1_000),),
        in_flight=frozenset(),
        topology=EverySubset(1),
    )


def learner() -> Learning:
    cost = CorrectedCost(toy_sib(), bound=2.0, rate=0.5)
    return Learning(create_policy("loongserve", cost), cost)


def result(seq: int, seconds: float, error: str | None = None) -> StepResult:
    return StepResult(seq=seq, started=1.0, ended=1.0 + seconds, error=error)


def test_steps_that_take_longer_than_foretold_are_foretold_longer() -> None:
    policy = learner()
    (step,) = policy.schedule(0.0, snapshot()).steps
    assert isinstance(step, PrefillStep)
    before = policy.cost.prefill(1, [ChunkWork(400, 0)])
    policy.observe(result(7, before * 1.5))
    assert policy.cost.prefill(1, [ChunkWork(400, 0)]) == pytest.approx(before * 1.5**0.5)
    assert policy.cost.factor("decode", 1) == 1.0


def test_bounds_hold_and_failures_teach_nothing() -> None:
    policy = learner()
    for turn in range(9):
        policy.schedule(float(turn), snapshot())
        policy.observe(result(7, 1e6))
    assert policy.cost.factor("prefill", 1) == pytest.approx(2.0)
    policy.schedule(99.0, snapshot())
    policy.observe(result(7, 1e-6, error="it broke"))
    policy.observe(result(1234, 1e-6))  # not one of its steps
    assert policy.cost.factor("prefill", 1) == pytest.approx(2.0)


def test_it_looks_once_in_a_while() -> None:
    policy = learner()
    policy.schedule(0.0, snapshot())
    policy.observe(result(7, 1e6))
    once = policy.cost.factor("prefill", 1)
    policy.schedule(0.1, snapshot())
    policy.observe(result(7, 1e6))
    assert policy.cost.factor("prefill", 1) == once
