"""An executor on a virtual clock: the engine's own loop runs over it as over devices.

Owns the clock. It stands still while the loop plans, and jumps: by the host's time when the
loop turns and launches, and to the next arrival or end of a step when the loop waits. So the
engine's one thread is a resource like any other: while it is busy, finished steps wait.

Promises: deterministic; KV is booked slot by slot (`ledger`), and every step is checked to
have all KV that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loongjax.costmodel.protocol import CostModel
from loongjax.costmodel.sib import Crowding, HostTime
from loongjax.costmodel.steps import step_seconds
from loongjax.errors import IntegrityError, StepError
from loongjax.executor.protocol import ExecutorLimits, RequestInput
from loongjax.kvcache.messages import SlotPlan
from loongjax.plan import (
    MigrateStep,
    PrefillStep,
    RequestId,
    SampledToken,
    Step,
    StepResult,
    step_requests,
)
from loongjax.programs.counts import ProgramCounts
from loongjax.simulator.devices import Devices
from loongjax.simulator.door import SimulatedDoor
from loongjax.simulator.jobs import Job
from loongjax.simulator.ledger import Held, Ledger
from loongjax.simulator.scaling import ScalingCounter

WORD = 0
END = 1
"""The two tokens of the simulated model: the second ends an answer."""


class VirtualExecutor:
    """See the module and `Executor`.

    Attributes:
      scaling: What the steps so far did to the groups.
      steps: How many were launched.
      busy_s: Time for which instances worked, of all together [s].
    """

    def __init__(
        self,
        *,
        door: SimulatedDoor,
        ledger: Ledger,
        cost: CostModel,
        host: HostTime,
        limits: ExecutorLimits,
        crowding: Crowding,
    ) -> None:
        self._door = door
        self._ledger = ledger
        self._cost = cost
        self._host = host
        self._limits = limits
        self._now = 0.0
        self._devices = Devices(crowding)
        self._flying: dict[int, tuple[SampledToken, ...]] = {}
        self._lives: dict[RequestId, _Life] = {}
        self.scaling = ScalingCounter()
        self.steps = 0
        self.busy_s = 0.0

    @property
    def limits(self) -> ExecutorLimits:
        """See `Executor`."""
        return self._limits

    @property
    def program_counts(self) -> ProgramCounts:
        """Nothing is compiled."""
        return ProgramCounts()

    def now(self) -> float:
        """The virtual clock [s]."""
        return self._now

    def admit(self, request: RequestInput) -> None:
        """See `Executor`."""
        job, held = self._door.jobs[request.id], self._ledger.open(request.id)
        self._lives[request.id] = _Life(job=job, held=held, word=SampledToken(request.id, WORD))

    def restrict(self, request: RequestId, allowed: np.ndarray) -> None:
        """Never called: a job of a workload has no mask."""
        raise StepError(f"the simulator has no tokens that {request!r} could be restricted to")

    def fork(self, source: RequestId, target: RequestId) -> None:
        """Never called: a job of a workload has one answer."""
        raise StepError(f"the simulator cannot share the KV of {source!r} with {target!r}")

    def submit(self, step: Step, slots: SlotPlan) -> None:
        """See `Executor`. Takes host time; runs when what is in flight on the group has ended."""
        seconds = step_seconds(step, self._ledger, self._cost)
        self._ledger.apply(step, slots)
        self.scaling.add(step)
        self._now += self._host.step_s + self._host.row_s * _rows(step)
        is_prompt = isinstance(step, PrefillStep)
        self._devices.launch(self._now, step.seq, step.group, seconds, is_prompt=is_prompt)
        lives = self._lives
        self._flying[step.seq] = tuple([lives[name].next_token() for name in _sampled(step)])
        self.steps += 1
        self.busy_s += seconds * len(step.group)

    def poll(self, timeout: float) -> list[StepResult]:
        """See `Executor`. Goes on to the next event, however far it is.

        Raises:
          StepError: Nothing will ever happen, and requests are still open.
          IntegrityError: The books of the pool do not agree.
        """
        self._ledger.check()
        self._now += self._host.turn_s
        coming = [t for t in (self._devices.next_end, self._door.next_time) if t is not None]
        if coming:
            self._now = max(self._now, min(coming))
        elif not self._door.closing:
            raise StepError("the simulation stands still: requests are open, and nothing is due")
        self._door.advance(self._now)
        results = []
        for step in self._devices.advance(self._now):
            tokens = self._flying.pop(step.seq)
            results.append(
                StepResult(seq=step.seq, tokens=tokens, started=step.started, ended=step.ended)
            )
        return results

    def wake(self) -> None:
        """Nobody waits on a virtual clock."""

    def drop_kv(self, request: RequestId) -> None:
        """See `Executor`."""
        self._ledger.drop(request)

    def forget(self, request: RequestId) -> None:
        """See `Executor`."""
        self._ledger.close(request)
        self.scaling.forget(request)
        del self._lives[request]

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(kw_only=True, slots=True)
class _Life:
    """A request.

    Attributes:
      job: What is known of it.
      held: Its KV.
      word: Any of its tokens but the last.
      generated: Tokens of steps that were launched so far.
    """

    job: Job
    held: Held
    word: SampledToken
    generated: int = 0

    def next_token(self) -> SampledToken:
        """What a step gives that was launched just now, if all that came before has KV."""
        job = self.job
        if self.held.total != job.prompt + self.generated:
            raise IntegrityError(
                f"request {job.id!r} is to go on after {job.prompt + self.generated} tokens, of "
                f"which {self.held.total} have KV; this is a fault in loongjax"
            )
        self.generated += 1
        return SampledToken(job.id, END) if self.generated == job.output else self.word


def _sampled(step: Step) -> tuple[RequestId, ...]:
    """Requests that get a token."""
    if isinstance(step, MigrateStep):
        return ()
    if isinstance(step, PrefillStep):
        return tuple([chunk.request for chunk in step.chunks if chunk.last])
    return step_requests(step)


def _rows(step: Step) -> int:
    if isinstance(step, PrefillStep):
        return len(step.chunks)
    return len(step.moves) if isinstance(step, MigrateStep) else len(step.rows)
