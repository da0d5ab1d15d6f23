from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.costmodel.sib import HostTime
from loongjax.errors import IntegrityError, PlanError, RequestError
from loongjax.kvcache import BlockAllocator
from loongjax.plan import DecodeStep, MigrateStep, Move, Plan, Snapshot
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.simulator import Job, Run, simulate
from tests.simulator.rig import job, toy_deployment


@dataclass
class Watched:
    """`FirstCome`, whose snapshots and plans are kept; `change` may change a plan."""

    change: Callable[[Snapshot, Plan], Plan] = lambda snapshot, plan: plan
    inner: FirstCome = field(default_factory=lambda: FirstCome(headroom=8))
    snapshots: list[Snapshot] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        self.snapshots.append(snapshot)
        self.plans.append(self.change(snapshot, self.inner.schedule(now, snapshot)))
        return self.plans[-1]


def run(*jobs: Job, policy: object = None, **deployment: object) -> Run:
    return simulate(jobs, toy_deployment(**deployment), policy or FirstCome())


def outcome(result: Run, name: str):
    (found,) = [one for one in result.outcomes if one.job.id == name]
    return found


def test_one_request_takes_what_the_cost_model_says():
    deployment = toy_deployment(instances=1)
    result = simulate([job("a", prompt=100, output=3, arrival=2.0)], deployment, FirstCome())
    (found,) = result.outcomes
    prefill = 0.02 + 1e-5 * 100 + 1e-9 * 100**2
    decodes = sum(0.011 + 1e-7 * (100 + i) + 1e-5 for i in (1, 2))
    assert found.ending == "completed"
    assert found.ttft == pytest.approx(prefill)
    assert found.end == pytest.approx(2.0 + prefill + decodes)
    assert found.tpot == pytest.approx(decodes / 2)
    assert (result.started, result.last_arrival, result.steps) == (2.0, 2.0, 3)


def test_host_time_is_charged_for_turns_steps_and_rows():
    quick = outcome(run(job("a", output=3)), "a")
    host = HostTime(turn_s=0.1, step_s=1.0, row_s=10.0)
    slow = outcome(run(job("a", output=3), host=host), "a")
    # three steps of one row; turns, while a step runs, are hidden as far as it lasts
    assert 33.0 < slow.end - quick.end < 33.4


def test_the_host_is_one_thread_for_all_instances():
    host = HostTime(turn_s=0.0, step_s=1.0, row_s=0.0)
    jobs = [job(f"r{i}", prompt=900, output=2) for i in range(4)]
    policy = FirstCome(tokens_per_rank=1000)
    result = run(*jobs, policy=policy, instances=4, host=host)
    starts = sorted(step.started for step in result.history.steps())
    assert len(starts) == 8
    assert all(b - a >= 1.0 - 1e-9 for a, b in pairwise(starts))


def test_an_idle_cluster_jumps_to_the_next_arrival():
    result = run(job("a"), job("b", arrival=1e6))
    assert outcome(result, "b").ttft == pytest.approx(outcome(result, "a").ttft)


def test_the_policy_never_sees_how_long_an_answer_is():
    policy = Watched()
    run(job("a", output=2, limit=30), job("b", output=25, limit=30), policy=policy)
    seen = {
        (view.id, view.max_tokens)
        for snapshot in policy.snapshots
        for view in (*snapshot.waiting, *snapshot.running)
    }
    assert seen == {("a", 30), ("b", 30)}


def test_a_caller_who_gives_up_frees_its_memory():
    policy = Watched()
    result = run(
        job("a", output=1_000, limit=1_000, cancel_after=0.5),
        job("late", arrival=0.1, cancel_after=5.0),
        job("b", arrival=1.0),
        policy=policy,
    )
    assert outcome(result, "a").ending == "cancelled"
    assert outcome(result, "a").end == pytest.approx(0.5, abs=0.05)
    assert outcome(result, "late").ending == "completed"
    last = policy.snapshots[-1]
    assert sum(one.slots - one.free_slots for one in last.instances) <= 60
    assert [view.id for view in last.running] == ["b"]


def test_what_can_never_fit_is_rejected_and_the_rest_goes_on():
    result = run(job("big", prompt=9_000), job("a"), instances=2, slots=4_096)
    assert outcome(result, "big").ending == "rejected"
    assert "8192" in (outcome(result, "big").error or "")
    assert outcome(result, "a").ending == "completed"


def test_nothing_but_rejections_ends_too():
    assert [one.ending for one in run(job("big", prompt=9_000)).outcomes] == ["rejected"]


def test_no_jobs_and_repeated_names_are_refused():
    with pytest.raises(RequestError, match="no jobs"):
        run()
    with pytest.raises(RequestError, match="1 different ids"):
        run(job("a"), job("a"))


def test_a_plan_that_breaks_a_rule_ends_the_simulation():
    def twice(snapshot: Snapshot, plan: Plan) -> Plan:
        return replace(plan, steps=plan.steps * 2)

    with pytest.raises(PlanError, match="seq should be"):
        run(job("a"), policy=Watched(change=twice))


def test_books_that_do_not_agree_end_the_simulation(monkeypatch):
    honest = BlockAllocator.used_slots
    monkeypatch.setattr(
        BlockAllocator, "used_slots", lambda self, i: honest(self, i) and honest(self, i) - 4
    )
    with pytest.raises(IntegrityError, match="slots are in use, steps took"):
        run(job("a"))


def test_migration_takes_time_and_is_counted():
    def moved(snapshot: Snapshot, plan: Plan) -> Plan:
        """The first decode step gives way to a move of all KV to the other instance."""
        step = plan.steps[0] if plan.steps else None
        if snapshot.next_seq != 1 or not isinstance(step, DecodeStep):
            return plan
        (view,) = snapshot.running
        move = Move(view.id, view.kv[0].instance, 1 - view.kv[0].instance, view.kv[0].tokens)
        return Plan(steps=(MigrateStep(seq=snapshot.next_seq, group=(0, 1), moves=(move,)),))

    policy = Watched(change=moved)
    result = run(job("a", prompt=1_000, output=3), policy=policy)
    plain = run(job("a", prompt=1_000, output=3))
    assert result.migrated_bytes == 1_000 * 100
    longer = outcome(result, "a").end - outcome(plain, "a").end
    assert longer == pytest.approx(0.001 + 1_000 * 1e-6)


JOBS = st.lists(
    st.tuples(
        st.integers(1, 300),  # prompt
        st.integers(1, 40),  # output
        st.integers(0, 40),  # limit beyond it
        st.floats(0.0, 2.0),  # arrival
        st.none() | st.floats(0.0, 1.0),  # patience
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=12)
@given(JOBS, st.sampled_from([1, 4, 16]), st.integers(1, 3), st.integers(0, 1))
def test_everybody_ends_once_and_alike_every_time(drawn, block_size, instances, slow):
    jobs = [
        Job(
            id=f"r{i}",
            prompt=prompt,
            output=output,
            limit=output + more,
            arrival=arrival,
            cancel_after=patience,
        )
        for i, (prompt, output, more, arrival, patience) in enumerate(drawn)
    ]
    host = HostTime(turn_s=0.001 * slow, step_s=0.002 * slow, row_s=0.0001 * slow)
    deployment = toy_deployment(
        instances=instances, slots=400, block_size=block_size, chunk=128, host=host
    )
    policy = FirstCome(tokens_per_rank=64, headroom=8)
    result = simulate(jobs, deployment, policy)
    again = simulate(jobs, deployment, policy)
    assert result.outcomes == again.outcomes
    assert sorted(one.job.id for one in result.outcomes) == sorted(one.id for one in jobs)
    for one in result.outcomes:
        assert one.ending in (
            {"completed", "cancelled"} if one.job.cancel_after is not None else {"completed"}
        )
        assert one.end >= one.job.arrival
        if one.ending == "completed":
            assert one.first_token is not None
            assert one.job.arrival < one.first_token <= one.end
    assert 0.0 <= result.busy_fraction <= 1.0 + 1e-9


def test_a_drained_instance_takes_no_more_kv():
    jobs = [job(f"r{i}", 300, 40, arrival=0.05 * i) for i in range(60)]
    deployment = toy_deployment()
    run = simulate(jobs, deployment, FirstCome(), drains=[(1.5, 0)])
    assert {outcome.ending for outcome in run.outcomes} == {"completed"}
    drained_at = 1.6  # a step may just have been planned
    kept = [
        share.instance
        for step in run.history.steps()
        if step.started > drained_at
        for share in step.kept
    ]
    assert set(kept) == {1}
    before = [s for step in run.history.steps() if step.started < 1.5 for s in step.kept]
    assert {share.instance for share in before} == {0, 1}
