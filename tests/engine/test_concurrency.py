"""Many callers and any order of completion: everyone gets the right tokens and one end."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.engine import FinishedEvent
from loongjax.plan import Step
from loongjax.scheduler.policies.first_come import FirstCome
from tests.engine.fake_executor import FakeExecutor, Flight, answer
from tests.engine.rig import Rig, collect, rig

THREADS, EACH = 8, 8


class Chaos:
    """Any order of completion and now and then a failure, repeatable by seed."""

    def __init__(self, seed: int, failures: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._failures = failures

    def order(self, flights: Sequence[Flight]) -> int:
        return self._random.randrange(len(flights))

    def fail(self, step: Step) -> str | None:
        return "chaos" if self._random.random() < self._failures else None

    def executor(self) -> FakeExecutor:
        return FakeExecutor(order=self.order, fail=self.fail)


def check(prompt: Sequence[int], wanted: int, tokens: tuple[int, ...], end: FinishedEvent) -> None:
    """Whatever came is a prefix of the model's answer, and all of it unless it was cut."""
    assert tokens == answer(prompt, len(tokens))
    assert (len(tokens) == wanted) or end.reason in ("abort", "error")
    assert end.reason in ("abort", "error") or end.reason == "length"
    if end.reason == "error":
        assert "2 failed steps" in end.error


def test_many_threads_submit_and_abort_at_once() -> None:
    start = threading.Barrier(THREADS)
    aborted: list[str] = []

    def caller(it: Rig, number: int) -> None:
        rng = random.Random(number)
        start.wait()
        open_ones = []
        for i in range(EACH):
            prompt = tuple(rng.randrange(1000) for _ in range(rng.randint(1, 90)))
            wanted = rng.randint(1, 12)
            handle = it.submit(f"{number}-{i}", prompt, max_tokens=wanted)
            open_ones.append((prompt, wanted, handle))
            if rng.random() < 0.3:
                victim = rng.choice(open_ones)[2]
                aborted.append(victim.id)
                rng.choice([victim.abort, lambda v=victim: it.engine.abort(v.id)])()
        for prompt, wanted, handle in open_ones:
            tokens, end = collect(handle)
            check(prompt, wanted, tokens, end)
            assert end.reason != "abort" or handle.id in aborted

    chaos = Chaos(1, failures=0.01)
    with rig(executor=chaos.executor(), instances=4) as it, ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(caller, it, number) for number in range(THREADS)]:
            done.result()
        it.executor.wait_for(lambda executor: not executor.known)
        it.executor.wait_idle()
        assert it.used == 0
        it.allocator.check_integrity()
        assert sum(count for _, count in it.engine.stats().finished) == THREADS * EACH


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    instances=st.integers(1, 4),
    block_size=st.sampled_from([1, 3, 16]),
    failures=st.sampled_from([0.0, 0.05]),
    slots=st.sampled_from([64, 256]),
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 10)), min_size=1, max_size=10),
)
def test_answer_does_not_depend_on_order_company_preemption_or_failures(
    seed: int,
    instances: int,
    block_size: int,
    failures: float,
    slots: int,
    sizes: list[tuple[int, int]],
) -> None:
    chaos = Chaos(seed, failures)
    with rig(
        executor=chaos.executor(),
        policy=FirstCome(headroom=0),
        instances=instances,
        slots=slots,
        block_size=block_size,
    ) as it:
        handles = [
            it.submit(str(n), tuple(range(n, n + prompt)), max_tokens=wanted)
            for n, (prompt, wanted) in enumerate(sizes)
        ]
        for n, ((prompt, wanted), handle) in enumerate(zip(sizes, handles, strict=True)):
            tokens, end = collect(handle)
            check(range(n, n + prompt), wanted, tokens, end)
            assert failures or end.reason == "length"
