"""Threads that wait for the tokens of launched steps, so that the engine's thread need not.

There is one for each instance, and a step goes to that of its group's first one. So results of
one group come in the order of its launches, though a step may be queued behind another; steps
of other groups in flight have other threads, for groups in flight are disjoint.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np

from loongjax.plan import Group, RequestId, SampledToken, StepResult

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """A step that runs: the token of each of `rows` will stand at its place in `tokens`."""

    seq: int
    rows: tuple[tuple[RequestId, int], ...]
    tokens: jax.Array
    started: float


class Waiters:
    """The threads. `now` is the clock of results; `hand_in` takes them, from any thread."""

    def __init__(
        self, instances: int, now: Callable[[], float], hand_in: Callable[[StepResult], None]
    ) -> None:
        self._now = now
        self._hand_in = hand_in
        # Not a ThreadPoolExecutor: Python stops those before exit handlers can close engines.
        self._queues: list[queue.SimpleQueue[Launched | StepResult | None]] = [
            queue.SimpleQueue() for _ in range(instances)
        ]
        self._threads = [
            threading.Thread(target=self._wait, args=(i,), name=f"loongjax-step-{i}", daemon=True)
            for i in range(instances)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, group: Group, item: Launched | StepResult) -> None:
        """Waits for a step; one that never started has its result already, and its turn too."""
        self._queues[group[0]].put(item)

    def close(self) -> None:
        """Waits for all that was added."""
        for waiting in self._queues:
            waiting.put(None)
        for thread in self._threads:
            thread.join()

    def _wait(self, instance: int) -> None:
        last_end = float("-inf")
        while (item := self._queues[instance].get()) is not None:
            result = self._result(item) if isinstance(item, Launched) else item
            # A step that was queued ran when the one before it had ended.
            result = replace(result, started=max(result.started, last_end))
            last_end = result.ended
            self._hand_in(result)

    def _result(self, launched: Launched) -> StepResult:
        try:
            tokens = np.asarray(launched.tokens).tolist()
        except Exception as error:
            _log.exception("step %d failed", launched.seq)
            return failure(launched.seq, error, launched.started, self._now())
        return StepResult(
            seq=launched.seq,
            tokens=tuple([SampledToken(name, tokens[at]) for name, at in launched.rows]),
            started=launched.started,
            ended=self._now(),
        )


def failure(seq: int, error: Exception, started: float, ended: float) -> StepResult:
    """The result of a step that failed."""
    text = f"{type(error).__name__}: {error}"
    return StepResult(seq=seq, error=text, started=started, ended=ended)
