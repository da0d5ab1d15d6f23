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

from loongjax.executor.inputs import StepInputs
from loongjax.plan import Group, PromptLogprobs, SampledToken, StepResult
from loongjax.sampling.told import token_logprobs

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """A step that runs.

    Attributes:
      inputs: What its program was told.
      said: int32 [A, SAID], perhaps still to come (`loongjax.sampling.fields`).
      scores: int32 [T, SAID - 1], of a prefill step's prompts.
      started: When it was launched.
    """

    seq: int
    inputs: StepInputs
    said: jax.Array
    scores: jax.Array | None = None
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
            tokens, prompts = _tokens(launched), _prompts(launched)
        except Exception as error:
            _log.exception("step %d failed", launched.seq)
            return failure(launched.seq, error, launched.started, self._now())
        return StepResult(
            seq=launched.seq,
            tokens=tokens,
            prompts=prompts,
            started=launched.started,
            ended=self._now(),
        )


def _tokens(launched: Launched) -> tuple[SampledToken, ...]:
    inputs, said_AxS = launched.inputs, np.asarray(launched.said)
    tokens = said_AxS[:, 0].tolist()
    if not inputs.told:
        return tuple([SampledToken(name, tokens[at]) for name, at in inputs.rows])
    return tuple(
        SampledToken(
            name,
            tokens[at],
            token_logprobs(said_AxS[at : at + 1], inputs.told[name])[0]
            if name in inputs.told
            else None,
        )
        for name, at in inputs.rows
    )


def _prompts(launched: Launched) -> tuple[PromptLogprobs, ...]:
    if not launched.inputs.scored:
        return ()
    scores_TxS = np.asarray(launched.scores)
    return tuple(
        PromptLogprobs(
            chunk.request,
            chunk.start,
            tuple(
                token_logprobs(
                    np.concatenate([chunk.tokens[:, None], scores_TxS[chunk.places]], axis=1),
                    chunk.top,
                )
            ),
        )
        for chunk in launched.inputs.scored
    )


def failure(seq: int, error: Exception, started: float, ended: float) -> StepResult:
    """The result of a step that failed."""
    text = f"{type(error).__name__}: {error}"
    return StepResult(seq=seq, error=text, started=started, ended=ended)
