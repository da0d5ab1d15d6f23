"""The seam between the engine and whatever runs its steps.

The JAX executor runs them on devices, the simulated one on a virtual clock; the engine
does not know which it has. All calls come from the engine's one loop thread, save `now`
and `wake`, which any thread may call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from loongjax.kvcache.messages import SlotPlan
from loongjax.plan import RequestId, Step, StepResult
from loongjax.programs.counts import ProgramCounts
from loongjax.sampling.params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestInput:
    """What an executor needs to know of a request beyond the steps.

    `seed` is always set here: the engine draws one when the user gave none. `sample` tells the
    answers to one prompt apart, which share a seed. `end_ids` are the tokens that end it.
    `next_id` is the token behind `token_ids` in a longer prompt that these are a part of: it is
    not computed, but its log-probability is told. Of one that `is_masked`, `restrict` says before
    each of its tokens which it may be.
    """

    id: RequestId
    token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    sample: int = 0
    end_ids: frozenset[int] = frozenset()
    next_id: int | None = None
    is_masked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorLimits:
    """What one step may hold.

    Attributes:
      max_chunk_tokens: Prompt tokens for each rank of a prefill step.
      max_rows: Rows for each rank of a decode step; also chunks in a prefill step.
      steps_ahead: How many decode steps of a group it takes behind one of the same group
        whose tokens are not known yet. The rows of each are among those of the one before,
        with the same masters. 0: it waits for every step.
    """

    max_chunk_tokens: int
    max_rows: int
    steps_ahead: int = 0


@runtime_checkable
class Executor(Protocol):
    """Runs steps in the order of their `seq`."""

    @property
    def limits(self) -> ExecutorLimits:
        """What one step may hold."""
        ...

    @property
    def program_counts(self) -> ProgramCounts:
        """How its programs came to be, so far. Any thread may ask."""
        ...

    def now(self) -> float:
        """The clock of everything that the engine records [s]."""
        ...

    def admit(self, request: RequestInput) -> None:
        """Makes a request known, before any step names it."""
        ...

    def restrict(self, request: RequestId, allowed: np.ndarray) -> None:
        """Says which tokens may be a masked request's next: bool [vocabulary]."""
        ...

    def fork(self, source: RequestId, target: RequestId) -> None:
        """Lets `target`, which has no KV, read the KV of `source` where it lies."""
        ...

    def submit(self, step: Step, slots: SlotPlan) -> None:
        """Launches a step; never blocks on a device. Failures come back from `poll`."""
        ...

    def poll(self, timeout: float) -> list[StepResult]:
        """Results of finished steps, in the order they finished; those of one group in the
        order of their launches. What is queued behind a step that failed fails too.

        Waits at most `timeout` seconds for the first, less if `wake` is called.
        """
        ...

    def wake(self) -> None:
        """Ends the `poll` that waits, or the next one when none does; never blocks."""
        ...

    def drop_kv(self, request: RequestId) -> None:
        """Forgets where a request's KV lies (it was preempted); its tokens are kept."""
        ...

    def forget(self, request: RequestId) -> None:
        """Forgets a request altogether; it ended."""
        ...

    def close(self) -> None:
        """Waits for what runs and gives devices and memory back."""
        ...
