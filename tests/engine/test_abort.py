"""An abort ends its request at once, whatever it does, and its slots come back."""

from __future__ import annotations

import threading

from loongjax.engine import Event, FinishedEvent, RequestHandle, TokensEvent
from loongjax.plan import Plan, Snapshot
from tests.engine.fake_executor import PATIENCE_S, FakeExecutor, answer
from tests.engine.rig import Rig, Wrapped, collect, rig

PROMPT = (1, 2, 3, 4, 5)


def settle(it: Rig) -> None:
    """Waits until nothing is left to do, and checks that nothing is left over."""
    it.executor.wait_for(lambda executor: not executor.known)
    it.executor.wait_idle()
    assert it.used == 0
    it.allocator.check_integrity()


def test_before_the_loop_took_it() -> None:
    busy, go_on = threading.Event(), threading.Event()

    def first(snapshot: Snapshot) -> Plan | None:
        busy.set()
        assert go_on.wait(PATIENCE_S)
        return None

    with rig(policy=Wrapped(first=first)) as it:
        other = it.submit("other", PROMPT)
        assert busy.wait(PATIENCE_S)
        handle = it.submit("a", PROMPT)
        handle.abort()
        go_on.set()
        assert collect(handle)[1].reason == "abort"
        assert collect(other)[1].reason == "length"
        assert not it.engine.steps_of("a")
        settle(it)


def test_while_it_waits() -> None:
    with rig(instances=1) as it:
        it.executor.hold()
        other = it.submit("other", PROMPT)
        it.executor.wait_for(lambda executor: executor.flights)
        handle = it.submit("a", PROMPT)
        it.executor.wait_for(lambda executor: "a" in executor.known)
        handle.abort()
        tokens, end = collect(handle)
        assert (tokens, end.reason, end.timings.first_scheduled) == ((), "abort", None)
        it.executor.wait_for(lambda executor: "a" not in executor.known)
        it.executor.release()
        assert collect(other)[0] == answer(PROMPT, 4)
        settle(it)


def test_while_its_prefill_runs() -> None:
    with rig() as it:
        it.executor.hold()
        handle = it.submit("a", PROMPT)
        it.executor.wait_for(lambda executor: executor.flights)
        it.engine.abort("a")
        tokens, end = collect(handle)
        assert (tokens, end.reason, end.timings.first_token) == ((), "abort", None)
        it.executor.wait_idle()
        assert it.used == 8  # the step in flight still writes there
        assert it.executor.known == {"a"}
        it.executor.release()
        settle(it)
        assert collect(it.submit("a", PROMPT))[0] == answer(PROMPT, 4)  # the id is free again


def test_while_it_decodes() -> None:
    with rig() as it:
        events: list[Event] = []

        def on_event(event: Event) -> None:  # on the loop's thread, the next step in flight
            events.append(event)
            if len(events) == 3:
                it.engine.abort("a")

        it.submit("a", PROMPT, on_event, max_tokens=100)
        settle(it)
    tokens = [event.token_ids[0] for event in events if isinstance(event, TokensEvent)]
    assert tuple(tokens) == answer(PROMPT, len(tokens))
    assert 3 <= len(tokens) < 100
    assert events[-1].reason == "abort"


def test_after_it_was_preempted() -> None:
    wait = threading.Event()

    def first(snapshot: Snapshot) -> Plan | None:
        if snapshot.running and snapshot.running[0].generated == 2 and not snapshot.in_flight:
            wait.set()
            return Plan(preempt=("a",))
        # Where it was preempted, let it wait behind the other one.
        return Plan() if wait.is_set() and snapshot.in_flight else None

    with rig(policy=Wrapped(first=first, ahead=False), instances=1) as it:
        handle = it.submit("a", PROMPT, max_tokens=50)
        assert wait.wait(PATIENCE_S)
        handle.abort()
        tokens, end = collect(handle)
        assert tokens == answer(PROMPT, len(tokens))
        assert end.reason == "abort"
        settle(it)


def test_after_its_end_it_does_nothing() -> None:
    with rig() as it:
        first = it.submit("a", PROMPT)
        collect(first)
        it.engine.abort("a")
        it.executor.hold()
        second = it.submit("a", PROMPT)
        first.abort()  # of another request with the same id
        it.executor.wait_for(lambda executor: executor.flights)
        it.executor.release()
        assert collect(second)[0] == answer(PROMPT, 4)
        settle(it)


def test_late_one_does_not_hit_the_next_request_of_that_id() -> None:
    class Late(FakeExecutor):
        """Lets the first request's abort come just before its id is free."""

        def forget(self, request: str) -> None:
            if len(handles) == 1:
                handles[0].abort()
            super().forget(request)

    def again(event: Event) -> None:
        if isinstance(event, FinishedEvent):
            handles.append(it.submit("a", PROMPT))

    handles: list[RequestHandle] = []
    with rig(executor=Late()) as it:
        handles.append(it.submit("a", PROMPT, again))
        it.executor.wait_for(lambda executor: len(handles) == 2)
        assert collect(handles[1])[0] == answer(PROMPT, 4)
        settle(it)


def test_twice_is_once() -> None:
    with rig() as it:
        it.executor.hold()
        handle = it.submit("a", PROMPT)
        it.executor.wait_for(lambda executor: executor.flights)
        handle.abort()
        handle.abort()
        it.executor.release()
        assert collect(handle)[1].reason == "abort"
        settle(it)
        assert it.engine.stats().finished == (("abort", 1),)
