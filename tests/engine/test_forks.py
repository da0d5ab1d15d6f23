"""Several answers to one prompt: computed once, shared, and each as if it were alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.engine import FinishedEvent, GenerationRequest, RequestHandle
from loongjax.errors import RequestError
from loongjax.executor.protocol import ExecutorLimits
from loongjax.plan import MigrateStep, Move, Plan, Snapshot
from loongjax.sampling.params import SamplingParams
from tests.engine.fake_executor import FakeExecutor, answer
from tests.engine.rig import PATIENCE_S, Rig, Wrapped, collect, rig

PROMPT = tuple(range(60))


def submit(
    it: Rig, n: int, *, name: str = "a", prompt: tuple[int, ...] = PROMPT, max_tokens: int = 6
) -> tuple[RequestHandle, ...]:
    params = SamplingParams(n=n, max_tokens=max_tokens)
    return it.engine.submit_samples(GenerationRequest(id=name, token_ids=prompt, params=params))


def one_at_a_time() -> FakeExecutor:
    """An executor that queues no step behind another, so that the policy sees every token."""
    return FakeExecutor(limits=ExecutorLimits(max_chunk_tokens=64, max_rows=8))


def answers(handles: tuple[RequestHandle, ...]) -> list[tuple[int, ...]]:
    found = []
    for handle in handles:
        tokens, end = collect(handle)
        assert end.reason == "length", end
        found.append(tokens)
    return found


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_answer_is_what_it_would_be_for_any_n(n: int, block_size: int) -> None:
    with rig(block_size=block_size) as it:
        handles = submit(it, n)
        assert answers(handles) == [answer(PROMPT, 6, i) for i in range(n)]
        assert [handle.id for handle in handles] == ["a", "a#1", "a#2", "a#3", "a#4"][:n]
        assert it.engine.stats().finished == (("length", n),)
        assert it.engine.stats().generated_tokens == 6 * n


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_prompt_is_computed_once_and_its_slots_are_shared(block_size: int) -> None:
    with rig(block_size=block_size) as it:
        answers(submit(it, 4))
        shared = (len(PROMPT) - 1) // block_size * block_size
        rest = len(PROMPT) - shared
        prefilled = it.engine.stats().prompt_tokens
        assert prefilled == shared + (4 * rest if rest > 1 else 0)
        used: dict[int, int] = {}
        fullest = 0
        for sample in it.engine.pool_samples():
            used[sample.instance] = sample.used
            fullest = max(fullest, sum(used.values()))
        own = -(-(rest + 6 - 1) // block_size) * block_size  # the last token has no KV
        print(f"4 answers of 6 tokens to {len(PROMPT)}: {fullest} slots in use at most")
        assert fullest == shared + 4 * own


def test_prompt_that_fills_no_block_is_not_shared() -> None:
    prompt = (7, 8, 9, 10)
    with rig(block_size=4) as it:
        assert answers(submit(it, 3, prompt=prompt)) == [answer(prompt, 6, i) for i in range(3)]


def test_samples_without_room_in_the_block_tables_are_computed_apart() -> None:
    """Tables have two entries for each block: 60 tokens, three times more, do not fit."""
    with rig(instances=1, slots=66, block_size=1) as it:
        assert answers(submit(it, 4)) == [answer(PROMPT, 6, i) for i in range(4)]
        assert it.engine.stats().prompt_tokens > 2 * len(PROMPT)


def test_one_answer_is_aborted_and_the_others_go_on() -> None:
    with rig() as it:
        handles = submit(it, 3, max_tokens=50)
        assert not isinstance(handles[1].get(PATIENCE_S), FinishedEvent)
        handles[1].abort()
        assert collect(handles[1])[1].reason == "abort"
        assert answers((handles[0], handles[2])) == [answer(PROMPT, 50, i) for i in (0, 2)]


def test_prompt_is_given_up_when_nobody_waits_for_it() -> None:
    with rig() as it:
        it.executor.hold()
        handles = submit(it, 3)
        it.executor.wait_for(lambda executor: executor.flights)
        handles[0].abort()
        handles[2].abort()
        assert [collect(handles[i])[1].reason for i in (0, 2)] == ["abort"] * 2
        it.executor.release()
        assert answers((handles[1],)) == [answer(PROMPT, 6, 1)]
        it.executor.hold()
        handles = submit(it, 2, name="b")
        it.executor.wait_for(lambda executor: executor.flights)
        it.engine.abort("b")
        it.engine.abort("b#1")
        assert [collect(handle)[1].reason for handle in handles] == ["abort"] * 2
        it.executor.release()
        it.executor.wait_for(lambda executor: not executor.known)
        assert it.used == 0
        assert answers(submit(it, 2, name="b")) == [answer(PROMPT, 6, i) for i in range(2)]


@pytest.mark.parametrize("seq", range(5))
def test_failed_step_loses_no_answer(seq: int) -> None:
    executor = FakeExecutor(fail=lambda step: "a chip fell off" if step.seq == seq else None)
    with rig(executor=executor) as it:
        assert answers(submit(it, 3)) == [answer(PROMPT, 6, i) for i in range(3)]
        assert it.engine.stats().failed_steps in (1, 2)  # perhaps with one queued behind it


def test_prompt_that_fails_twice_ends_all_answers() -> None:
    executor = FakeExecutor(fail=lambda step: "no power" if step.seq < 2 else None)
    with rig(executor=executor) as it:
        for handle in submit(it, 3):
            tokens, end = collect(handle)
            assert (tokens, end.reason) == ((), "error")
            assert "2 failed steps" in end.error
        assert it.engine.stats().finished == (("error", 3),)
        assert answers(submit(it, 2)) == [answer(PROMPT, 6, i) for i in range(2)]


def test_preempted_answer_is_computed_anew_and_the_others_keep_their_kv() -> None:
    preempted: list[str] = []

    def first(snapshot: Snapshot) -> Plan | None:
        ready = [view for view in snapshot.running if view.generated == 3]
        if preempted or snapshot.in_flight or len(ready) < 3:
            return None
        assert all(view.shared for view in ready)
        preempted.append("a#1")
        return Plan(preempt=("a#1",))

    with rig(executor=one_at_a_time(), policy=Wrapped(first=first)) as it:
        assert answers(submit(it, 3)) == [answer(PROMPT, 6, i) for i in range(3)]
        assert it.engine.stats().preemptions == 1


def test_shared_kv_that_moves_is_copied_for_the_one_that_moves() -> None:
    moved: list[str] = []

    def first(snapshot: Snapshot) -> Plan | None:
        ready = [view for view in snapshot.running if view.generated == 3]
        if moved or snapshot.in_flight or len(ready) < 3:
            return None
        view = ready[1]
        ((source, tokens),) = view.kv
        moved.append(view.id)
        step = MigrateStep(
            seq=snapshot.next_seq, group=(0, 1), moves=(Move(view.id, source, 1 - source, tokens),)
        )
        return Plan(steps=(step,))

    with rig(executor=one_at_a_time(), policy=Wrapped(first=first)) as it:
        assert answers(submit(it, 3)) == [answer(PROMPT, 6, i) for i in range(3)]
        assert moved


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=5
    ),
    st.sampled_from([(1, 100, 1), (2, 60, 4), (3, 32, 1), (3, 48, 16)]),
)
def test_everybody_ends_in_a_small_pool(asked: list[tuple[int, int, int]], pool) -> None:
    """Of (n, prompt, max_tokens); more than the pool holds at once, so that some wait, or lose
    their KV to others with whom they share it.
    """
    instances, slots, block_size = pool
    with rig(instances=instances, slots=slots, block_size=block_size) as it:
        handles = [
            submit(it, n, name=f"r{i}", prompt=PROMPT[-prompt:], max_tokens=max_tokens)
            for i, (n, prompt, max_tokens) in enumerate(asked)
        ]
        for own, (n, prompt, max_tokens) in zip(handles, asked, strict=True):
            assert answers(own) == [answer(PROMPT[-prompt:], max_tokens, i) for i in range(n)]


def test_closing_ends_answers_that_wait_for_their_prompt() -> None:
    with rig() as it:
        it.executor.hold()
        handles = submit(it, 3)
        it.executor.wait_for(lambda executor: executor.flights)
        it.executor.release()
        it.engine.close()
        assert all(collect(handle)[1].reason in ("abort", "length") for handle in handles)


def test_refusals() -> None:
    with rig() as it:
        with pytest.raises(RequestError, match=r"n = 3 answers.*submit_samples"):
            it.submit("a", PROMPT, n=3)
        with pytest.raises(RequestError, match=r"n must be in \[1, 128\], not 129"):
            SamplingParams(n=129)
        it.executor.hold()
        submit(it, 3)
        with pytest.raises(RequestError, match=r"'a#2' is in use"):
            it.submit("a#2", PROMPT)
        with pytest.raises(RequestError, match=r"'a' is in use"):
            submit(it, 2)
        it.executor.release()


def test_callback_hears_whose_event_it_is() -> None:
    heard: list[int] = []
    with rig() as it:
        params = SamplingParams(n=3, max_tokens=2)
        request = GenerationRequest(id="a", token_ids=PROMPT, params=params)
        it.engine.submit_samples(request, on_event=lambda i, event: heard.append(i))
        it.executor.wait_for(lambda executor: len(executor.inputs) == 4 and not executor.known)
    assert sorted(heard) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
