"""Many callers and any order of completion: everyone gets the right tokens and one end."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.engine import FinishedEvent
from loongjax.executor.protocol import ExecutorLimits
from loongjax.plan import MigrateStep, Step
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

    def executor(self, max_chunk_tokens: int = 64) -> FakeExecutor:
        limits = ExecutorLimits(max_chunk_tokens=max_chunk_tokens, max_rows=8)
        return FakeExecutor(limits=limits, order=self.order, fail=self.fail)


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
    chunk=st.sampled_from([4, 16, 64]),
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 10)), min_size=1, max_size=10),
)
def test_answer_does_not_depend_on_order_company_chunks_preemption_or_failures(
    seed: int,
    instances: int,
    block_size: int,
    failures: float,
    slots: int,
    chunk: int,
    sizes: list[tuple[int, int]],
) -> None:
    chaos = Chaos(seed, failures)
    with rig(
        executor=chaos.executor(chunk),
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


def test_kv_comes_together_while_the_pool_is_nearly_full() -> None:
    """Requests of like size, in random order of completion: some grow, and shrink again."""
    moves = 0
    for seed in range(4):
        chaos = Chaos(seed, failures=0.01)
        rng = random.Random(seed)
        with rig(
            executor=chaos.executor(8),
            policy=FirstCome(tokens_per_rank=8, headroom=4),
            instances=4,
            slots=24,
            block_size=1,
        ) as it:
            sizes = [(rng.randint(2, 16), rng.randint(2, 24)) for _ in range(16)]
            handles = [
                it.submit(str(n), tuple(range(prompt)), max_tokens=wanted)
                for n, (prompt, wanted) in enumerate(sizes)
            ]
            for (prompt, wanted), handle in zip(sizes, handles, strict=True):
                tokens, end = collect(handle)
                check(range(prompt), wanted, tokens, end)
            moves += sum(isinstance(step, MigrateStep) for step in it.executor.submitted)
    assert moves
