"""An executor on a virtual clock: the engine's own loop runs over it as over devices.

Owns the clock. It stands still while the loop plans, and jumps: by the host's time when the
loop turns and launches, and to the next arrival or end of a step when the loop waits. So the
engine's one thread is a resource like any other: while it is busy, finished steps wait.

Promises: deterministic; KV is booked slot by slot (`ledger`), and every step is checked to
have all KV that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from loongjax.costmodel.protocol import CostModel
from loongjax.costmodel.sib import HostTime
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
        crowding: float = 0.0,
    ) -> None:
        """`crowding`: see `Devices`."""
        self._door = door
        self._ledger = ledger
        self._cost = cost
        self._host = host
        self._limits = limits
        self._now = 0.0
        self._devices = Devices(crowding)
        self._flying: dict[int, _Flight] = {}
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
        self._lives[request.id] = _Life(
            job=self._door.jobs[request.id], held=self._ledger.open(request.id)
        )

    def fork(self, source: RequestId, target: RequestId) -> None:
        """Never called: a job of a workload has one answer."""
        raise StepError(f"the simulator cannot share the KV of {source!r} with {target!r}")

    def submit(self, step: Step, slots: SlotPlan) -> None:
        """See `Executor`. Takes host time; runs when what is in flight on the group has ended."""
        seconds = step_seconds(step, self._ledger, self._cost)
        self._ledger.apply(step, slots)
        self.scaling.add(step)
        self._now += self._host.step_s + self._host.row_s * _rows(step)
        self._devices.launch(self._now, step.seq, step.group, seconds)
        names = _sampled(step)
        held = tuple([self._lives[name].held.total for name in names])
        self._flying[step.seq] = _Flight(names=names, held=held)
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
            tokens = self._sample(self._flying.pop(step.seq))
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

    def _sample(self, flight: _Flight) -> tuple[SampledToken, ...]:
        lives = self._lives
        return tuple(
            [
                SampledToken(name, lives[name].next_token(held))
                for name, held in zip(flight.names, flight.held, strict=True)
            ]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    """A step that was launched.

    Attributes:
      names: Requests that get a token by it.
      held: KV tokens that each of those has then.
    """

    names: tuple[RequestId, ...]
    held: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class _Life:
    """A request: its job, its KV, and how many tokens were generated so far."""

    job: Job
    held: Held
    generated: int = 0

    def next_token(self, held: int) -> int:
        """Goes on by one token, if all that came before has KV: `held` tokens."""
        if held != self.job.prompt + self.generated:
            raise IntegrityError(
                f"request {self.job.id!r} is to go on after {self.job.prompt + self.generated} "
                f"tokens, of which {held} have KV; this is a fault in loongjax"
            )
        self.generated += 1
        return END if self.generated == self.job.output else WORD


def _sampled(step: Step) -> tuple[RequestId, ...]:
    """Requests that get a token."""
    if isinstance(step, MigrateStep):
        return ()
    if isinstance(step, PrefillStep):
        return tuple([chunk.request for chunk in step.chunks if chunk.last])
    return tuple([row.request for row in step.rows])


def _rows(step: Step) -> int:
    if isinstance(step, PrefillStep):
        return len(step.chunks)
    return len(step.moves) if isinstance(step, MigrateStep) else len(step.rows)
