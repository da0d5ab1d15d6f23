"""An engine over a `FakeExecutor`, and policies that misbehave on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from loongjax.cluster.topology import EverySubset
from loongjax.engine import (
    Engine,
    Event,
    FinishedEvent,
    GenerationRequest,
    RequestHandle,
    StopWatch,
)
from loongjax.kvcache import BlockAllocator
from loongjax.plan import Plan, Snapshot
from loongjax.sampling.params import SamplingParams
from loongjax.scheduler.policies.first_come import FirstCome
from tests.engine.fake_executor import PATIENCE_S, VOCAB, FakeExecutor

MODEL_LEN = 200


@dataclass
class Rig:
    """What a test works with."""

    engine: Engine
    executor: FakeExecutor
    allocator: BlockAllocator

    def submit(
        self,
        name: str,
        prompt: tuple[int, ...] = (1, 2, 3),
        on_event: Callable[[Event], object] | None = None,
        **params: object,
    ) -> RequestHandle:
        """Submits a prompt; four tokens unless `max_tokens` says otherwise."""
        sampling = SamplingParams(**({"max_tokens": 4} | params))
        return self.engine.submit(
            GenerationRequest(id=name, token_ids=prompt, params=sampling), on_event=on_event
        )

    @property
    def used(self) -> int:
        """Slots in use. To be asked while the loop does nothing."""
        return sum(self.allocator.used_slots(i) for i in range(self.allocator.instances))


@contextmanager
def rig(
    *,
    executor: FakeExecutor | None = None,
    policy: object | None = None,
    instances: int = 2,
    slots: int = 256,
    block_size: int = 4,
    eos_ids: tuple[int, ...] = (),
    watch: Callable[[SamplingParams], StopWatch] | None = None,
) -> Iterator[Rig]:
    """An engine that is closed at the end; then no slot may be in use, and no thread left."""
    before = set(threading.enumerate())
    executor = executor or FakeExecutor()
    allocator = BlockAllocator(instances=instances, slots=slots, block_size=block_size)
    engine = Engine(
        executor=executor,
        policy=policy or FirstCome(),
        allocator=allocator,
        topology=EverySubset(instances),
        vocab_size=VOCAB,
        max_model_len=MODEL_LEN,
        eos_ids=eos_ids,
        watch=watch,
    )
    parts = Rig(engine=engine, executor=executor, allocator=allocator)
    survived = False
    try:
        yield parts
        survived = engine.alive
    finally:
        executor.release()
        engine.close()
    assert executor.closed
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    if survived:
        assert parts.used == 0
        allocator.check_integrity()


def collect(handle: RequestHandle) -> tuple[tuple[int, ...], FinishedEvent]:
    """All tokens of a request, and its end."""
    tokens: list[int] = []
    while True:
        event = handle.get(timeout=PATIENCE_S)
        if isinstance(event, FinishedEvent):
            return tuple(tokens), event
        tokens += event.token_ids


@dataclass
class Wrapped:
    """A policy that asks `first` before it does what `FirstCome` does.

    `first` gives a plan, or None to pass; what it is asked stands in `seen`. Without `ahead`
    it is asked after every step.
    """

    first: Callable[[Snapshot], Plan | None]
    ahead: bool = True
    inner: FirstCome = field(default_factory=FirstCome)
    seen: list[Snapshot] = field(default_factory=list)

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        self.seen.append(snapshot)
        plan = self.first(snapshot)
        plan = self.inner.schedule(now, snapshot) if plan is None else plan
        return plan if self.ahead else replace(plan, ahead=frozenset())
