"""One step ahead in the engine: nothing that anyone hears of depends on it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.engine.ahead import continue_step
from loongjax.executor.protocol import ExecutorLimits
from loongjax.plan import DecodeRow, DecodeStep, Plan, Snapshot, Step
from loongjax.scheduler.policies.first_come import FirstCome
from tests.engine.fake_executor import FakeExecutor, Flight, answer
from tests.engine.rig import Rig, Wrapped, collect, rig

PROMPT = (1, 2, 3, 4, 5)
ANSWER = answer(PROMPT, 40)


def limits(ahead: int) -> ExecutorLimits:
    return ExecutorLimits(max_chunk_tokens=64, max_rows=8, steps_ahead=ahead)


def watched(**options: object) -> Wrapped:
    return Wrapped(first=lambda snapshot: None, **options)


def step_of(*rows: tuple[str, int, int], group: tuple[int, ...] = (0, 1)) -> DecodeStep:
    return DecodeStep(seq=3, group=group, rows=tuple(DecodeRow(*row) for row in rows))


def following(step: DecodeStep, ending: str = "", full: bool = False) -> DecodeStep | None:
    return continue_step(
        step, seq=4, goes_on=lambda name: name not in ending, fits=lambda step: not full
    )


# ---- what the step behind a step is ------------------------------------------------------


def test_the_step_behind_keeps_rows_masters_and_homes() -> None:
    step = step_of(("a", 0, 1), ("b", 1, 1))
    assert following(step) == DecodeStep(seq=4, group=(0, 1), rows=step.rows)
    assert following(step, ending="a").rows == (DecodeRow("b", 1, 1),)


def test_there_is_none_where_all_end_or_a_home_is_full() -> None:
    step = step_of(("a", 0, 1), ("b", 1, 1))
    assert following(step, ending="ab") is None
    assert following(step, full=True) is None


def test_there_is_none_where_a_smaller_program_would_do() -> None:
    step = step_of(*((name, 0, 0) for name in "abcdefghi"), group=(0,))  # a program of 32 rows
    assert following(step) is not None
    assert following(step, ending="a") is None
    uneven = step_of(*((name, 0, 0) for name in "abcdefghi"), ("j", 1, 1))  # 5 and 4 would do
    assert following(uneven, ending="j") is None


# ---- the engine ---------------------------------------------------------------------------


def test_the_policy_is_not_asked_while_nothing_happens() -> None:
    policy = watched()
    with rig(policy=policy, instances=1) as it:
        assert collect(it.submit("a", PROMPT, max_tokens=40))[0] == ANSWER
        assert len(it.executor.queued) == 38  # all but the first of 39
        it.executor.wait_idle()
        assert len(policy.seen) <= 5  # it came, its prompt, its first step, its end
        assert it.engine.stats().generated_tokens == 40


@pytest.mark.parametrize(("ahead", "policy"), [(0, watched()), (1, watched(ahead=False))])
def test_executor_and_policy_can_both_refuse(ahead: int, policy: Wrapped) -> None:
    with rig(executor=FakeExecutor(limits=limits(ahead)), policy=policy) as it:
        assert collect(it.submit("a", PROMPT, max_tokens=9))[0] == ANSWER[:9]
        assert not it.executor.queued


def test_length_is_known_before_and_takes_no_slot_too_many() -> None:
    with rig(slots=12, block_size=4, instances=1) as it:  # 5 + 8 - 1 = 12
        assert collect(it.submit("a", PROMPT, max_tokens=8))[0] == ANSWER[:8]
        assert len(it.executor.submitted) == 8  # one prefill step, 7 decode steps
        assert it.executor.queued


def test_an_end_token_is_found_one_step_late_and_its_successor_dropped() -> None:
    with rig(eos_ids=(ANSWER[3],)) as it:
        tokens, end = collect(it.submit("a", PROMPT, max_tokens=40))
        assert (tokens, end.reason, end.stop_token) == (ANSWER[:4], "stop", ANSWER[3])
        it.executor.wait_for(lambda executor: not executor.known)
        it.executor.wait_idle()
        assert it.used == 0
        assert it.engine.stats().generated_tokens == 4
        assert len(it.executor.submitted) == 5  # the last one for nothing
        assert len(it.engine.steps_of("a")) == 5


def test_a_prompt_drains_the_group_that_it_needs() -> None:
    with rig(instances=1) as it:
        it.executor.hold()
        first = it.submit("a", PROMPT, max_tokens=40)
        it.executor.wait_for(lambda executor: executor.flights)
        it.executor.release()
        it.executor.wait_for(lambda executor: len(executor.queued) > 2)
        second = it.submit("b", PROMPT, max_tokens=40)
        assert [collect(one)[0] for one in (first, second)] == [ANSWER, ANSWER]
        kinds = [record.kind for record in it.engine.steps()]
        begun = kinds.index("prefill", 1)
        assert len([r for r in it.engine.steps()[begun:] if len(r.requests) == 2]) > 2
        assert any(len(step.rows) == 2 for step in it.executor.queued)


def test_an_abort_leaves_the_row_out_of_the_next_step() -> None:
    with rig(instances=1) as it:
        it.executor.hold()
        handles = [it.submit(name, PROMPT, max_tokens=40) for name in "ab"]
        it.executor.wait_for(lambda executor: executor.flights)
        it.executor.release()
        it.executor.wait_for(lambda executor: len(executor.queued) > 2)
        it.executor.hold()
        handles[0].abort()
        tokens, end = collect(handles[0])
        assert tokens == ANSWER[: len(tokens)]
        assert end.reason == "abort" or len(tokens) == 40
        it.executor.release()
        assert collect(handles[1])[0] == ANSWER


@pytest.mark.parametrize("seq", [2, 3])
def test_with_a_failed_step_fails_the_one_behind_and_kv_is_lost_once(seq: int) -> None:
    executor = FakeExecutor(fail=lambda step: "no power" if step.seq == seq else None)
    with rig(executor=executor, instances=1) as it:
        tokens, end = collect(it.submit("a", PROMPT, max_tokens=12))
        assert (tokens, end.reason) == (ANSWER[:12], "length")
        stats = it.engine.stats()
        assert (stats.failed_steps, stats.recomputed_requests) == (2, 1)
        errors = [record.error for record in it.engine.steps() if record.error]
        assert errors == ["no power", f"step {seq} failed before it"]


def test_records_of_one_instance_do_not_overlap() -> None:
    with rig(instances=1) as it:
        collect(it.submit("a", PROMPT, max_tokens=9))
        records = it.engine.steps()
        assert it.executor.queued
    for one, other in pairwise(records):
        assert one.seq < other.seq
        assert one.ended <= other.started


def test_state_is_published_though_nothing_is_planned() -> None:
    executor = FakeExecutor()
    with rig(executor=executor, instances=1) as it:
        handle = it.submit("a", PROMPT, max_tokens=40)
        for _ in range(20):
            handle.get()
        executor.hold()
        executor.wait_idle()
        (record,) = (r for r in it.engine.requests() if r.end is None)
        assert record.generated >= 15
        assert it.engine.stats().instances[0].used >= 20
        executor.release()


class Moody:
    """`FirstCome`, but at random it takes back that groups go on, or preempts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._inner = FirstCome(headroom=0)

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        plan = self._inner.schedule(now, snapshot)
        if self._random.random() < 0.3:
            return Plan(steps=plan.steps, preempt=plan.preempt)
        return plan


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    instances=st.integers(1, 3),
    block_size=st.sampled_from([1, 4]),
    slots=st.sampled_from([32, 128]),
    failures=st.sampled_from([0.0, 0.03]),
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8),
    stops=st.sets(st.integers(0, 7)),
    aborts=st.sets(st.integers(0, 7), max_size=2),
)
def test_tokens_are_the_same_with_and_without(
    seed: int,
    instances: int,
    block_size: int,
    slots: int,
    failures: float,
    sizes: list[tuple[int, int]],
    stops: set[int],
    aborts: set[int],
) -> None:
    def run(ahead: int) -> list[tuple[tuple[int, ...], str]]:
        luck = random.Random(seed)

        def order(flights: Sequence[Flight]) -> int:
            return luck.randrange(len(flights))

        def fail(step: Step) -> str | None:
            return "chaos" if luck.random() < failures else None

        executor = FakeExecutor(limits=limits(ahead), order=order, fail=fail)
        with rig(
            executor=executor,
            policy=Moody(seed),
            instances=instances,
            slots=slots,
            block_size=block_size,
        ) as it:
            found = [collect(handle) for handle in submit(it)]
        return [(tokens, end.reason) for tokens, end in found]

    def submit(it: Rig) -> list:
        handles = []
        for n, (prompt, wanted) in enumerate(sizes):
            ids = tuple(range(n, n + prompt))
            stop = answer(ids, wanted)[wanted // 2 :][:1] if n in stops else ()
            handles.append(it.submit(str(n), ids, max_tokens=wanted, stop_token_ids=stop))
        for n in aborts:
            if n < len(handles):
                handles[n].abort()
        return handles

    for n, (one, other) in enumerate(zip(run(0), run(1), strict=True)):
        if n in aborts or failures:
            shorter = min(len(one[0]), len(other[0]))
            assert one[0][:shorter] == other[0][:shorter]
        else:
            assert one == other
