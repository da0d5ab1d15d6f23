"""loongjax itself, through its public engine; see `loongjax.bench.worker`.

With a degree given, all work is confined to that many of the instances, so that the cost of
a degree can be told from the cost of having instances.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from loongjax.api.build import build_engine
from loongjax.cluster.topology import EverySubset
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.engine import Engine, Event, GenerationRequest, TokensEvent
from loongjax.errors import BenchError
from loongjax.plan import Plan, Snapshot
from loongjax.sampling.params import SamplingParams
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.scheduler.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Confined:
    """A policy that sees the first `degree` instances alone, and one group: all of them."""

    degree: int
    inner: Policy

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`."""
        return self.inner.schedule(
            now,
            replace(
                snapshot,
                instances=snapshot.instances[: self.degree],
                topology=EverySubset(self.degree, (self.degree,)),
            ),
        )


_Events: TypeAlias = queue.SimpleQueue[tuple[int, Event]]


def _put(events: _Events, number: int, event: Event) -> None:
    events.put((number, event))


class Ours:
    """An engine of loongjax.

    Attributes:
      engine: What is measured.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs = itertools.count()
        self._programs: int | None = None

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int
    ) -> Iterator[list[tuple[int, int]]]:
        """See `Subject`. Raises BenchError where a request fails or a program is compiled."""
        job = next(self._jobs)
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        events: _Events = queue.SimpleQueue()
        for number, prompt in enumerate(prompts):
            self.engine.submit(
                GenerationRequest(id=f"{job}-{number}", token_ids=tuple(prompt), params=params),
                on_event=partial(_put, events, number),
            )
        running = len(prompts)
        while running:
            number, event = events.get()
            if isinstance(event, TokensEvent):
                yield [(number, token) for token in event.token_ids]
                continue
            running -= 1
            if event.error is not None:
                raise BenchError(f"request {job}-{number} failed: {event.error}")
        self._check_compiled()

    def warmed(self) -> None:
        """From here on no program may be made."""
        self._programs = self._made()

    def _check_compiled(self) -> None:
        if self._programs is not None and self._made() != self._programs:
            raise BenchError(
                f"{self._made() - self._programs} programs were made while time was taken; warm "
                "up with the same sizes"
            )

    def _made(self) -> int:
        return self.engine.executor.program_counts.made


def load(settings: dict[str, Any]) -> Ours:
    """See `Subject`; settings: model, dtype, max_len, instances, degree, pool_slots."""
    degree = settings["degree"]
    config = EngineConfig(
        cluster=ClusterConfig(instances=settings["instances"]),
        pool=PoolConfig(slots=settings["pool_slots"]),
        max_model_len=settings["max_len"],
        dtype=settings["dtype"],
    )
    policy = None if degree is None else Confined(degree=degree, inner=FirstCome())
    return Ours(build_engine(settings["model"], config, policy=policy).engine)
