"""What a timeline is made of, its parts, its text, and the one of a real engine."""

from __future__ import annotations

import pytest

from loongjax import LLM, SamplingParams
from loongjax.engine import PoolSample
from loongjax.errors import UserError
from loongjax.plan import Plan, Snapshot
from loongjax.timeline import Timeline
from tests.engine.fake_executor import FakeExecutor
from tests.engine.rig import Wrapped, rig
from tests.timeline.story import SLOTS, START, decode, pool, requests, steps, timeline


def test_records_alone_are_enough() -> None:
    found = Timeline.from_steps(reversed(steps()))
    assert (found.instances, found.pool_slots, found.pool, found.requests) == (4, None, (), ())
    assert found.steps == tuple(sorted(steps(), key=lambda step: step.started))
    assert (found.zero, found.bounds) == (START, (0.0, pytest.approx(2.118)))
    assert found.groups[:3] == ((0, 1, 2, 3), (0, 1), (2,))


def test_what_was_before_the_first_step_is_left_out() -> None:
    early = [PoolSample(START - 9, 0, 7), PoolSample(START - 5, 0, 5), PoolSample(START + 1, 0, 3)]
    found = Timeline.from_steps(
        [decode(0, (0,), 0.5, 2.0, "late")], pool=early, requests=requests()[:2]
    )
    assert found.zero == START + 0.5
    assert found.pool == (PoolSample(START + 0.5, 0, 5), PoolSample(START + 1, 0, 3))
    assert [request.id for request in found.requests] == ["long", "short"]
    later = Timeline.from_steps([decode(0, (0,), 1.5, 2.0, "late")], requests=requests())
    assert [request.id for request in later.requests] == ["long", "unlucky", "late"]


def test_while_the_first_step_runs_time_starts_with_what_is_known() -> None:
    found = Timeline.from_steps([], instances=4, pool=pool()[:2], requests=requests()[:1])
    assert found.zero == requests()[0].arrival
    assert found.bounds == (0.0, pytest.approx(0.01))
    assert len(found.requests) == 1


def test_a_part_of_it() -> None:
    part = timeline().between(1.0, 1.5)
    assert part.bounds == (1.0, 1.5)
    assert (part.zero, part.groups) == (START, timeline().groups)
    assert all(step.ended >= START + 1.0 and step.started <= START + 1.5 for step in part.steps)
    assert {step.seq for step in part.steps} >= {31, 52, 53}
    assert part.pool[0] == PoolSample(START + 1.0, 0, 900)
    assert all(START + 1.0 <= sample.time <= START + 1.5 for sample in part.pool)
    assert [request.id for request in part.requests] == ["long", "short", "unlucky", "late"]
    assert timeline().between(2.0).bounds == (2.0, timeline().bounds[1])
    assert [request.id for request in timeline().between(2.0).requests] == ["unlucky", "late"]


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(UserError, match=r"between 2\.0 s and 1\.0 s .* 0\.000 s to 2\.120 s"):
        timeline().between(2.0, 1.0)


def test_busy_share_counts_time_within_the_bounds() -> None:
    half = [decode(0, (0, 1), 0.0, 1.0, "a"), decode(1, (3,), 0.0, 4.0, "b")]
    assert Timeline.from_steps(half).busy_share == pytest.approx(6 / 16)
    assert Timeline.from_steps(half).between(0.5, 1.5).busy_share == pytest.approx(2 / 4)
    assert Timeline.from_steps([]).busy_share == 0.0


def test_text_is_short_and_says_the_numbers() -> None:
    assert str(timeline()).splitlines() == [
        "Timeline: 4 instances, 2.12 s, 4 requests, 76 steps (1 failed), "
        "instances busy 80% of the time",
        "  prefill        3 steps      3,000 tokens, by degree 1: 1, 2: 1, 4: 1",
        "  decode        71 steps         81 tokens, by degree 1: 21, 2: 50",
        "  migrate         1 step        700 tokens, by degree 2: 1",
    ]
    assert repr(timeline()) == f"<{str(timeline()).splitlines()[0]}>"
    assert repr(Timeline.from_steps([])) == "<Timeline: 0 instances, 0 s, 0 steps>"


FOUR = SamplingParams(max_tokens=4)


def test_timeline_of_an_llm(tmp_path) -> None:
    executor = FakeExecutor(duration=lambda step: 2.0)
    with rig(executor=executor, instances=4, slots=64) as it:
        llm = LLM.from_engine(it.engine)
        assert llm.timeline().steps == ()
        llm.generate([list(range(40)), [1, 2, 3]], FOUR)
        found = llm.timeline()
        assert found.steps == llm.steps()
        assert (found.instances, found.pool_slots) == (4, 64)
        assert [(r.prompt, r.generated, r.reason) for r in found.requests] == [
            (40, 4, "length"),
            (3, 4, "length"),
        ]
        for request in found.requests:
            assert request.arrival == request.first_scheduled == 0.0
            assert request.first_token == 2.0
            assert request.end == 8.0
        used = {sample.instance: sample.used for sample in found.pool}
        assert sum(used.values()) == 0
        assert max(sample.used for sample in found.pool) >= 40 / 4
        assert found.pool[0].time == 0.0
        assert found.pool[-1].time == 8.0
        found.plot(tmp_path / "steps.png")
        assert "2 requests" in str(found)
    assert llm.timeline() == found


def test_open_requests_and_aborted_ones_are_seen() -> None:
    with rig() as it:
        llm = LLM.from_engine(it.engine)
        it.executor.hold()
        first = it.submit("first", max_tokens=50)
        it.executor.wait_for(lambda executor: executor.flights)
        it.submit("second", max_tokens=50)
        it.executor.wait_idle()
        assert {(r.id, r.reason, r.end) for r in llm.timeline().requests} == {
            ("first", None, None),
            ("second", None, None),
        }
        held = {sample.instance: sample.used for sample in llm.timeline().pool}
        assert sum(held.values()) > 0
        first.abort()
        it.executor.release()
        it.executor.wait_for(lambda executor: "first" not in executor.known)
        assert ("first", "abort") in {(r.id, r.reason) for r in llm.timeline().requests}
    assert {r.reason for r in llm.timeline().requests} <= {"abort", "length"}
    empty = {sample.instance: sample.used for sample in llm.timeline().pool}
    assert sum(empty.values()) == 0


def test_preempted_kv_is_seen_to_go() -> None:
    def preempt_once(snapshot: Snapshot) -> Plan | None:
        old = [view for view in snapshot.running if view.generated == 2]
        if not old or snapshot.in_flight or preempted:
            return None
        preempted.append(old[0].id)
        return Plan(preempt=(old[0].id,))

    preempted: list[str] = []
    with rig(policy=Wrapped(first=preempt_once, ahead=False), instances=1, block_size=1) as it:
        llm = LLM.from_engine(it.engine)
        llm.generate([[1, 2, 3]], FOUR)
        assert [sample.used for sample in llm.timeline().pool] == [3, 4, 0, 5, 6, 0]


def test_the_story_adds_up() -> None:
    assert (len(timeline().steps), len(pool())) == (76, 14)
    assert max(sample.used for sample in pool()) < SLOTS
