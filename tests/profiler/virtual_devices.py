"""An executor that takes as long as a cost model says, for what the profiler asks of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from loongjax.costmodel import ScalingInformationBase
from loongjax.costmodel.steps import step_seconds
from loongjax.executor.protocol import ExecutorLimits, RequestInput
from loongjax.kvcache import BlockAllocator
from loongjax.kvcache.messages import SlotPlan
from loongjax.plan import PrefillStep, Step, StepResult
from loongjax.simulator.devices import Devices
from loongjax.simulator.ledger import Ledger


@dataclass(kw_only=True)
class VirtualDevices:
    """Times are those of `truth`, and up to `noise` more. `fail_after`: so many steps work."""

    allocator: BlockAllocator
    truth: ScalingInformationBase
    limits: ExecutorLimits
    noise: float = 0.0
    fail_after: int = 1_000_000
    steps: int = 0
    clock: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.allocator)
        self.devices = Devices(self.truth.crowding)

    def now(self) -> float:
        return self.clock

    def admit(self, request: RequestInput) -> None:
        self.ledger.open(request.id)

    def forget(self, request: str) -> None:
        self.ledger.close(request)

    def submit(self, step: Step, slots: SlotPlan) -> None:
        self.steps += 1
        seconds = step_seconds(step, self.ledger, self.truth)
        self.ledger.apply(step, slots)
        self.ledger.check()
        slower = 1.0 + self.noise * self.chance.random()
        is_prompt = isinstance(step, PrefillStep)
        self.devices.launch(self.clock, step.seq, step.group, seconds * slower, is_prompt=is_prompt)

    def poll(self, timeout: float) -> list[StepResult]:
        end = self.devices.next_end
        assert end is not None
        self.clock = end
        error = "it broke" if self.steps > self.fail_after else None
        return [
            StepResult(seq=step.seq, started=step.started, ended=step.ended, error=error)
            for step in self.devices.advance(end)
        ]
