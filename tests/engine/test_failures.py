"""What fails is confined: to a step's requests, to one request, or to a dead engine."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from loongjax.engine import RequestHandle
from loongjax.errors import EngineClosedError, StepError
from loongjax.executor.protocol import RequestInput
from loongjax.kvcache.messages import SlotPlan
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Placement,
    Plan,
    PrefillStep,
    Rejection,
    Share,
    Snapshot,
    Step,
    StepResult,
)
from tests.engine.fake_executor import FakeExecutor, answer
from tests.engine.rig import Rig, Wrapped, collect, rig

PROMPT = (1, 2, 3, 4, 5)
ANSWER = answer(PROMPT, 8)


def failing(*seqs: int) -> FakeExecutor:
    return FakeExecutor(fail=lambda step: "a chip fell off" if step.seq in seqs else None)


@pytest.mark.parametrize("seq", [0, 1, 4, 7])
def test_request_of_a_failed_step_is_computed_anew(seq: int) -> None:
    with rig(executor=failing(seq)) as it:
        tokens, end = collect(it.submit("a", PROMPT, max_tokens=8))
        assert tokens == ANSWER  # none lost, none twice
        assert end.reason == "length"
        stats = it.engine.stats()
        queued = sum(step.seq == seq + 1 for step in it.executor.queued)
        assert (stats.failed_steps, stats.recomputed_requests) == (1 + queued, 1)
        record = it.engine.steps()[seq]
        assert (record.seq, record.error) == (seq, "a chip fell off")


def test_neighbours_with_kv_on_the_failed_group_are_computed_anew() -> None:
    def first(snapshot: Snapshot) -> Plan | None:
        """Prefills b, alone and once, when a has two tokens."""
        if failing_seqs or not snapshot.running or snapshot.in_flight:
            return None
        seq = snapshot.next_seq
        if snapshot.running[0].generated < 2:
            return Plan(steps=(DecodeStep(seq=seq, group=(0,), rows=(DecodeRow("a", 0, 0),)),))
        chunk = Chunk(request="b", start=0, length=5, last=True)
        keep = Placement(request="b", shares=(Share(0, 5),))
        failing_seqs.add(seq)
        return Plan(steps=(PrefillStep(seq=seq, group=(0,), chunks=(chunk,), keep=(keep,)),))

    failing_seqs: set[int] = set()
    executor = FakeExecutor(fail=lambda step: "no power" if step.seq in failing_seqs else None)
    policy = Wrapped(first=first, ahead=False)
    with rig(executor=executor, policy=policy, instances=1) as it:
        it.executor.hold()
        handles = [it.submit("a", PROMPT, max_tokens=8)]
        it.executor.wait_for(lambda executor: executor.flights)
        handles.append(it.submit("b", PROMPT, max_tokens=8))
        it.executor.wait_for(lambda executor: "b" in executor.known)
        it.executor.release()
        assert [collect(handle)[0] for handle in handles] == [ANSWER, ANSWER]
        assert it.engine.stats().recomputed_requests == 2


def test_requests_elsewhere_do_not_notice() -> None:
    executor = failing(0)
    with rig(executor=executor) as it:
        executor.hold()
        handles = [it.submit("a", PROMPT), it.submit("b", PROMPT)]
        executor.wait_for(lambda executor: len(executor.flights) == 2)
        executor.release()
        assert [collect(handle)[0] for handle in handles] == [ANSWER[:4]] * 2
        assert it.engine.stats().recomputed_requests == 1


def test_request_that_failed_twice_ends_with_an_error() -> None:
    with rig(executor=failing(1, 3)) as it:
        tokens, end = collect(it.submit("a", PROMPT, max_tokens=8))
        assert tokens == ANSWER[:1]  # with step 1 failed step 2, which was queued behind it
        assert end.reason == "error"
        assert re.search(r"2 failed steps.*step 3 on group \(.*\): a chip fell off", end.error)
        assert collect(it.submit("b", PROMPT))[0] == ANSWER[:4]
        assert it.engine.alive


def test_failure_of_an_aborted_request_frees_its_slots() -> None:
    with rig(executor=failing(0)) as it:
        it.executor.hold()
        handle = it.submit("a", PROMPT)
        it.executor.wait_for(lambda executor: executor.flights)
        handle.abort()
        assert collect(handle)[1].reason == "abort"
        it.executor.release()
        it.executor.wait_for(lambda executor: not executor.known)
        assert it.used == 0
        assert it.engine.stats().recomputed_requests == 0


def test_preempted_request_keeps_its_tokens() -> None:
    def first(snapshot: Snapshot) -> Plan | None:
        ready = [v for v in snapshot.running if v.generated == 3 and v.homes]
        if ready and not snapshot.in_flight and not preempted:
            preempted.extend(ready)
            return Plan(preempt=("a",))
        return None

    preempted: list[object] = []
    policy = Wrapped(first=first, ahead=False)
    with rig(policy=policy) as it:
        assert collect(it.submit("a", PROMPT, max_tokens=8))[0] == ANSWER
        assert it.engine.stats().preemptions == 1
    (again,) = [
        view for s in policy.seen for view in s.waiting if view.generated == 3 and not s.in_flight
    ]
    assert (again.computed, again.uncomputed, again.kv, again.tail) == (0, 8, (), None)


def test_preempted_request_longer_than_a_prefill_step_is_computed_anew_in_chunks() -> None:
    preempted: list[int] = []

    def first(snapshot: Snapshot) -> Plan | None:
        grown = snapshot.running and snapshot.running[0].length == 65 and not snapshot.in_flight
        if not grown or preempted:  # computed anew, it looks the same again
            return None
        preempted.append(snapshot.version)
        return Plan(preempt=("a",))

    prompt = tuple(range(60))
    with rig(policy=Wrapped(first=first, ahead=False), instances=1) as it:
        tokens, end = collect(it.submit("a", prompt, max_tokens=20))
        assert (tokens, end.reason) == (answer(prompt, 20), "length")
        lengths = [r.tokens for r in it.engine.steps_of("a") if r.kind == "prefill"]
        assert lengths == [60, 64]  # the 65th comes with a decode step


def test_rejection_ends_the_request_with_the_policys_reason() -> None:
    def first(snapshot: Snapshot) -> Plan | None:
        bad = [view.id for view in snapshot.waiting if view.id == "bad"]
        return Plan(reject=(Rejection("bad", "too late for its deadline"),)) if bad else None

    with rig(policy=Wrapped(first=first)) as it:
        handles = [it.submit("bad", PROMPT), it.submit("good", PROMPT)]
        _, end = collect(handles[0])
        assert (end.reason, end.error) == ("error", "too late for its deadline")
        assert collect(handles[1])[0] == ANSWER[:4]


def test_stuck_policy_costs_the_oldest_request_not_the_engine() -> None:
    def first(snapshot: Snapshot) -> Plan | None:
        return Plan() if any(view.id == "a" for view in snapshot.waiting) else None

    with rig(policy=Wrapped(first=first)) as it:
        handles = [it.submit("a", PROMPT), it.submit("b", PROMPT)]
        _, end = collect(handles[0])
        assert end.reason == "error"
        assert "Wrapped plans no step although nothing is in flight" in end.error
        assert "needs up to 8 KV slots" in end.error
        assert collect(handles[1])[0] == ANSWER[:4]


def raising(snapshot: Snapshot) -> Plan | None:
    if any(view.id == "bad" for view in snapshot.waiting):
        raise ZeroDivisionError("no cost for degree 3")
    return None


def breaking_a_rule(snapshot: Snapshot) -> Plan | None:
    bad = any(view.id == "bad" for view in snapshot.waiting)
    step = DecodeStep(seq=snapshot.next_seq, group=(0,), rows=())
    stranger = DecodeStep(seq=snapshot.next_seq, group=(7,), rows=())
    return Plan(steps=(step, step, stranger)) if bad else None


@pytest.mark.parametrize(
    ("first", "cause"),
    [(raising, "ZeroDivisionError: no cost for degree 3"), (breaking_a_rule, "PlanError: ")],
)
def test_wrong_policy_kills_the_engine_and_everyone_hears_of_it(
    first: Callable[[Snapshot], Plan | None], cause: str
) -> None:
    with rig(policy=Wrapped(first=first)) as it:
        assert_death(it, [it.submit("good", PROMPT, max_tokens=100), it.submit("bad")], cause)


class Breaking(FakeExecutor):
    """Raises where the protocol does not allow it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def admit(self, request: RequestInput) -> None:
        self._break("admit")
        super().admit(request)

    def submit(self, step: Step, slots: SlotPlan) -> None:
        self._break("submit")
        super().submit(step, slots)

    def poll(self, timeout: float) -> list[StepResult]:
        if self.flights:
            self._break("poll")
        return super().poll(timeout)

    def forget(self, request: str) -> None:
        self._break("forget")
        super().forget(request)

    def _break(self, where: str) -> None:
        if where == self._where:
            raise OSError(f"{where} broke")


@pytest.mark.parametrize("where", ["admit", "submit", "poll", "forget"])
def test_broken_executor_kills_the_engine_and_everyone_hears_of_it(where: str) -> None:
    with rig(executor=Breaking(where)) as it:
        first = it.submit("a", PROMPT)
        try:
            second = [it.submit("b", PROMPT, max_tokens=100)]
        except EngineClosedError:  # the first one was its death already
            second = []
        if where == "forget":  # its own end was known before
            assert collect(first)[1].reason == "length"
            assert_death(it, second, "OSError: forget broke")
        else:
            assert_death(it, [first, *second], f"OSError: {where} broke")


def assert_death(it: Rig, handles: list[RequestHandle], cause: str) -> None:
    for handle in handles:
        _, end = collect(handle)
        assert end.reason == "error"
        assert end.error.startswith(f"the engine died of {cause}")
    it.executor.wait_for(lambda executor: executor.closed)
    assert not it.engine.alive
    assert not it.engine.stats().alive
    with pytest.raises(EngineClosedError, match=cause):
        it.submit("late")


def test_executor_that_cannot_be_closed_is_reported_once() -> None:
    class Stubborn(FakeExecutor):
        def close(self) -> None:
            super().close()
            raise OSError("the device hangs")

    with rig(executor=Stubborn()) as it:
        with pytest.raises(StepError, match="could not be closed: the device hangs"):
            it.engine.close()
        it.engine.close()
