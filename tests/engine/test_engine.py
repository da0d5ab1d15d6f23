"""The whole way of a request through the engine, when nothing goes wrong."""

from __future__ import annotations

import re

import pytest

from loongjax.engine import Event, FinishedEvent, GenerationRequest, TokensEvent
from loongjax.errors import CapacityError, EngineClosedError, RequestError
from tests.engine.fake_executor import PATIENCE_S, FakeExecutor, answer
from tests.engine.rig import MODEL_LEN, Wrapped, collect, rig

PROMPT = (1, 2, 3, 4, 5)
ANSWER = answer(PROMPT, 8)


def test_tokens_are_those_of_the_model() -> None:
    with rig() as it:
        handles = {n: it.submit(str(n), tuple(range(1, n + 1)), max_tokens=n) for n in range(1, 30)}
        for n, handle in handles.items():
            tokens, end = collect(handle)
            assert tokens == answer(range(1, n + 1), n)
            assert (end.reason, end.error, end.stop_token) == ("length", None, None)


def test_disjoint_groups_are_in_flight_together() -> None:
    with rig(executor=FakeExecutor(duration=lambda step: 1.0 + step.group[0])) as it:
        it.executor.hold()
        handles = [it.submit(str(n), PROMPT, max_tokens=8) for n in range(4)]
        it.executor.wait_for(lambda executor: len(executor.flights) > 1)
        it.executor.release()
        assert [collect(handle)[0] for handle in handles] == [ANSWER] * 4


def test_prompt_too_long_for_one_instance_is_served_by_two() -> None:
    prompt = tuple(range(100))  # one instance takes 64 tokens in a step
    with rig() as it:
        tokens, _ = collect(it.submit("a", prompt))
        assert tokens == answer(prompt, 4)
        assert it.engine.steps_of("a")[0].degree == 2


def test_prompt_too_long_for_any_step_is_served_in_chunks() -> None:
    prompt = tuple(range(150))  # two instances take 128 tokens in a step
    with rig() as it:
        tokens, _ = collect(it.submit("a", prompt))
        assert tokens == answer(prompt, 4)
        lengths = [r.tokens for r in it.engine.steps_of("a") if r.kind == "prefill"]
        assert lengths == [128, 22]


def test_eos_ends_the_answer() -> None:
    with rig(eos_ids=(ANSWER[3],)) as it:
        tokens, end = collect(it.submit("a", PROMPT, max_tokens=8))
        assert tokens == ANSWER[:4]
        assert (end.reason, end.stop_token) == ("stop", ANSWER[3])
        tokens, end = collect(it.submit("b", PROMPT, max_tokens=8, ignore_eos=True))
        assert tokens == ANSWER
        assert end.reason == "length"


def test_stop_tokens_end_the_answer_even_where_eos_is_ignored() -> None:
    with rig(eos_ids=(ANSWER[1],)) as it:
        handle = it.submit("a", PROMPT, max_tokens=8, stop_token_ids=(ANSWER[2],), ignore_eos=True)
        events = list(handle)
        assert events[-2] == TokensEvent(token_ids=(ANSWER[2],), stopped=True)
        assert events[-1].stop_token == ANSWER[2]


def test_stop_token_in_the_last_place_counts_as_a_stop() -> None:
    with rig(eos_ids=(ANSWER[1],)) as it:
        _, end = collect(it.submit("a", PROMPT, max_tokens=2))
        assert end.reason == "stop"


def test_without_max_tokens_the_answer_goes_to_the_end_of_the_context() -> None:
    with rig() as it:
        tokens, end = collect(it.submit("a", (1, 2), max_tokens=None))
        assert len(tokens) == MODEL_LEN - 2
        assert end.reason == "length"


def test_timings_and_records_are_in_the_executors_time() -> None:
    executor = FakeExecutor(duration=lambda step: 10.0 + step.seq)
    executor.advance(5.0)
    with rig(executor=executor) as it:
        _, end = collect(it.submit("a", PROMPT, max_tokens=3))
        times = end.timings
        assert (times.arrival, times.first_scheduled) == (5.0, 5.0)
        assert (times.first_token, times.end) == (15.0, 38.0)
        records = it.engine.steps_of("a")
        assert [record.kind for record in records] == ["prefill", "decode", "decode"]
        assert [(record.started, record.ended) for record in records] == [
            (5.0, 15.0),
            (15.0, 26.0),
            (26.0, 38.0),
        ]
        assert records[0].tokens == sum(share.tokens for share in records[0].kept) == 5
        assert it.engine.steps() == records
        assert it.engine.now() == 38.0


def test_seed_is_drawn_where_none_is_given() -> None:
    with rig() as it:
        for name, seed in (("a", None), ("b", None), ("c", 17)):
            collect(it.submit(name, seed=seed))
        seeds = {name: given.seed for name, given in it.executor.inputs.items()}
        assert seeds["c"] == 17
        assert seeds["a"] != seeds["b"]


def test_policy_sees_priority_and_deadline() -> None:
    policy = Wrapped(first=lambda snapshot: None)
    with rig(policy=policy) as it:
        request = GenerationRequest(id="a", token_ids=PROMPT, priority=3, deadline=9.5)
        it.engine.submit(request)
        it.executor.wait_for(lambda executor: executor.submitted)
    (view,) = policy.seen[0].waiting
    assert (view.priority, view.deadline, view.prompt) == (3, 9.5, 5)


def test_unchanged_views_are_the_same_objects() -> None:
    policy = Wrapped(first=lambda snapshot: None)
    with rig(policy=policy, instances=1) as it:
        it.executor.hold()
        it.submit("a", PROMPT)
        it.executor.wait_for(lambda executor: executor.flights)
        it.submit("b", PROMPT)
        it.executor.wait_for(lambda executor: "b" in executor.known)
        it.submit("c", PROMPT)
        it.executor.wait_for(lambda executor: "c" in executor.known)
        it.executor.wait_idle()
    before, after = policy.seen[1:3]
    assert after.version > before.version
    views = {view.id: view for view in (*before.waiting, *before.running)}
    later = {view.id: view for view in (*after.waiting, *after.running)}
    assert set(views) == {"a", "b"}
    assert all(later[name] is view for name, view in views.items())
    assert after.instances[0] is before.instances[0]
    assert after.in_flight == {"a"}


def test_stats_count_what_happened() -> None:
    with rig() as it:
        collect(it.submit("a", PROMPT))
        collect(it.submit("b", PROMPT))
        it.executor.wait_idle()
        stats = it.engine.stats()
        assert (stats.alive, stats.waiting, stats.running) == (True, 0, 0)
        assert [(i.id, i.slots, i.used, i.busy) for i in stats.instances] == [
            (0, 256, 0, False),
            (1, 256, 0, False),
        ]
        assert {(c.kind, c.count) for c in stats.steps} == {("decode", 6), ("prefill", 2)}
        assert (stats.prompt_tokens, stats.generated_tokens) == (10, 8)
        assert (stats.preemptions, stats.failed_steps, stats.recomputed_requests) == (0, 0, 0)
        assert stats.finished == (("length", 2),)
        assert stats.programs.compiled == 3


def test_stats_show_what_is_held() -> None:
    with rig(instances=1) as it:
        it.executor.hold()
        it.submit("a", PROMPT)
        it.executor.wait_for(lambda executor: executor.flights)
        it.submit("b", PROMPT)
        it.executor.wait_for(lambda executor: "b" in executor.known)
        it.executor.wait_idle()
        stats = it.engine.stats()
        assert stats.waiting == 1
        assert stats.running == 1
        assert stats.instances[0].used == 8  # five tokens in blocks of four
        assert stats.instances[0].busy


def test_idle_engine_does_nothing() -> None:
    with rig() as it:
        collect(it.submit("a", max_tokens=3))
        it.executor.wait_idle()
        # Each poll gave a step or was woken: by the start, the submission, or nothing else.
        assert it.executor.polls <= 3 + 3


def test_nothing_new_is_not_planned_for() -> None:
    policy = Wrapped(first=lambda snapshot: None)
    with rig(policy=policy) as it:
        it.executor.hold()
        it.submit("a")
        it.executor.wait_for(lambda executor: executor.flights)
        it.executor.wait_idle()
        polls, plans = it.executor.polls, len(policy.seen)
        it.executor.wake()
        it.executor.wait_for(lambda executor: executor.polls > polls)
        assert len(policy.seen) == plans


def test_callback_gets_the_events() -> None:
    events: list[Event] = []
    with rig() as it:
        it.submit("a", PROMPT, events.append, max_tokens=2)
        it.executor.wait_for(lambda executor: "a" in executor.inputs and not executor.known)
        it.executor.wait_idle()
    assert events[:2] == [TokensEvent(token_ids=(token,)) for token in ANSWER[:2]]
    assert isinstance(events[2], FinishedEvent)


def test_broken_callback_aborts_its_request_alone() -> None:
    def break_down(event: Event) -> None:
        raise OSError("the client is gone")

    with rig() as it:
        it.submit("bad", PROMPT, break_down, max_tokens=100)
        assert collect(it.submit("good", PROMPT))[0] == ANSWER[:4]
        it.executor.wait_for(lambda executor: not executor.known)
        it.executor.wait_idle()
        assert dict(it.engine.stats().finished) == {"abort": 1, "length": 1}


def test_requests_that_cannot_be_served_raise_in_the_callers_thread() -> None:
    with rig(slots=32) as it:
        with pytest.raises(RequestError, match="empty"):
            it.submit("a", ())
        with pytest.raises(CapacityError, match=re.escape("has 64")):
            it.submit("a", PROMPT, max_tokens=100)
        assert it.engine.limits.capacity == 64
        assert not it.executor.inputs


def test_id_in_use_is_refused_until_its_request_has_ended() -> None:
    with rig() as it:
        it.executor.hold()
        handle = it.submit("a", PROMPT)
        with pytest.raises(RequestError, match="'a' is in use"):
            it.submit("a", PROMPT)
        it.executor.release()
        collect(handle)
        assert collect(it.submit("a", PROMPT))[0] == ANSWER[:4]


def test_close_aborts_what_is_open_and_may_be_called_again() -> None:
    with rig() as it:
        it.executor.hold()
        handles = [it.submit(name, PROMPT) for name in "abc"]
        it.executor.wait_for(lambda executor: executor.flights)
        it.engine.close()
        assert [handle.get(timeout=PATIENCE_S).reason for handle in handles] == ["abort"] * 3
        assert not it.engine.alive
        assert it.used == 0
        assert it.engine.stats().instances[0].used == 0
        with pytest.raises(EngineClosedError, match="was closed"):
            it.submit("d", PROMPT)
        it.engine.close()
        handles[0].abort()  # harmless
        it.engine.abort("b")


def test_close_from_a_callback_does_not_wait_for_itself() -> None:
    with rig() as it:
        ends: list[Event] = []

        def close(event: Event) -> None:
            ends.append(event)
            it.engine.close()

        it.submit("a", PROMPT, close, max_tokens=100)
        it.executor.wait_for(lambda executor: executor.closed)
        assert not it.engine.alive
    assert ends[-1].reason == "abort"


def test_two_engines_live_side_by_side() -> None:
    with rig() as one, rig() as other:
        handles = [it.submit("a", PROMPT) for it in (one, other)]
        assert [collect(handle)[0] for handle in handles] == [ANSWER[:4]] * 2
