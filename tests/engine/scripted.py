"""A real engine on a real executor, repeatable: who comes, goes and fails stands in a script.

The engine runs in its own thread as ever; what happens to it is done in that thread too, in
`poll`. Requests come and are aborted at a given poll, and of the steps that have ended one at
a time is told, chosen by chance. So one seed gives one run.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from loongjax.engine import (
    Engine,
    EngineStats,
    Event,
    FinishedEvent,
    GenerationRequest,
    StepRecord,
    sample_id,
)
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.executor.protocol import RequestInput
from loongjax.kvcache import BlockAllocator
from loongjax.kvcache.messages import SlotPlan
from loongjax.plan import Group, Step, StepResult
from loongjax.sampling.params import SamplingParams
from loongjax.scheduler.policy import Policy
from tests.engine.sabotage import Moment, failing

PATIENCE_S = 300.0


@dataclass(kw_only=True)
class Answer:
    """What was said to a request, of one sample, and how it ended."""

    tokens: list[int] = field(default_factory=list)
    end: FinishedEvent | None = None

    def hear(self, event: Event) -> None:
        """The engine's callback."""
        assert self.end is None, "something came after the end"
        if isinstance(event, FinishedEvent):
            self.end = event
        else:
            self.tokens += event.token_ids


@dataclass(kw_only=True)
class Role:
    """One request of a script, and what became of it.

    Attributes:
      prompt, params: What it asks.
      comes: The poll at which it is submitted.
      leaves: The poll at which it is aborted, if it has not ended; or None.
      answers: `params.n` of them.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    comes: int = 0
    leaves: int | None = None
    answers: list[Answer] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = [Answer() for _ in range(self.params.n)]

    @property
    def end(self) -> FinishedEvent | None:
        """The first answer's."""
        return self.answers[0].end


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a script led to.

    Attributes:
      stats: The engine's, at the end.
      steps: Every step that ended.
      failed: The seqs of the steps that were made to fail.
      fullest: The most slots that were in use at once.
    """

    stats: EngineStats
    steps: Sequence[StepRecord]
    failed: Sequence[int]
    fullest: int


class ScriptedExecutor:
    """An executor that is shared by many runs; see the module."""

    def __init__(
        self,
        inner: JaxExecutor,
        roles: Sequence[Role],
        *,
        fails: Callable[[Step], Moment | None],
        seed: int,
    ) -> None:
        self._inner = inner
        self._fails = fails
        self._chance = random.Random(seed)
        self._cues = sorted(
            [(role.comes, i, self._submit) for i, role in enumerate(roles)]
            + [(role.leaves, i, self._abort) for i, role in enumerate(roles) if role.leaves],
            key=lambda cue: cue[:2],
        )
        self._roles = roles
        self._names = [f"r{i}" for i in range(len(roles))]
        self._polls = 0
        self._woken = threading.Event()
        self._flying: dict[int, Group] = {}
        self._landed: list[StepResult] = []
        self._known: set[str] = set()
        self.begin: threading.Event = threading.Event()
        self.done = threading.Event()
        self.failed: list[int] = []
        self.engine: Engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def admit(self, request: RequestInput) -> None:
        self._known.add(request.id)
        self._inner.admit(request)

    def forget(self, request: str) -> None:
        self._known.remove(request)
        self._inner.forget(request)

    def submit(self, step: Step, slots: SlotPlan) -> None:
        moment = self._fails(step)
        if moment is not None:
            self.failed.append(step.seq)
        self._flying[step.seq] = step.group
        with nullcontext() if moment is None else failing(self._inner, moment):
            self._inner.submit(step, slots)

    def poll(self, timeout: float) -> list[StepResult]:
        self.begin.wait(PATIENCE_S)
        self._act()
        if self._woken.is_set():
            self._woken.clear()
            return []
        while len(self._landed) < len(self._flying):
            self._landed += self._inner.poll(PATIENCE_S)
        if not self._landed:
            assert not self._cues
            self.done.set()
            self._woken.wait(timeout)
            return []
        self._landed.sort(key=lambda result: result.seq)  # they end in any order
        result = self._chance.choice([r for r in self._landed if self._is_next(r)])
        self._landed.remove(result)
        del self._flying[result.seq]
        return [result]

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self.done.set()  # before the script's end only if the engine died
        assert not self._known, f"never forgotten: {self._known}"

    def _is_next(self, result: StepResult) -> bool:
        """Whether no earlier step on one of its instances is still to be told of."""
        group = self._flying[result.seq]
        earlier = [other for seq, other in self._flying.items() if seq < result.seq]
        return all(set(group).isdisjoint(other) for other in earlier)

    def _act(self) -> None:
        """Does what the script has for this poll; when nothing else happens, what comes next."""
        self._polls += 1
        while self._cues and (self._cues[0][0] <= self._polls or not self._flying):
            _, i, act = self._cues.pop(0)
            act(i)
            if self._woken.is_set() and not self._flying:
                break

    def _submit(self, i: int) -> None:
        role = self._roles[i]
        request = GenerationRequest(id=self._names[i], token_ids=role.prompt, params=role.params)
        if role.params.n > 1:
            self.engine.submit_samples(request, on_event=lambda i, e: role.answers[i].hear(e))
        else:
            self.engine.submit(request, on_event=role.answers[0].hear)

    def _abort(self, i: int) -> None:
        for sample in range(self._roles[i].params.n):
            self.engine.abort(sample_id(self._names[i], sample))


def perform(
    executor: JaxExecutor,
    policy: Policy,
    roles: Sequence[Role],
    *,
    slots: int,
    vocab_size: int,
    fails: Callable[[Step], Moment | None] = lambda step: None,
    seed: int = 0,
    eos_ids: Iterable[int] = (),
) -> Run:
    """Runs a script to its end; then nobody may hold a slot, and the books must be right.

    `slots` are those of each instance that are used, at most as many as `executor` has.
    """
    scripted = ScriptedExecutor(executor, roles, fails=fails, seed=seed)
    topology = executor.topology
    allocator = BlockAllocator(
        instances=topology.instances, slots=slots, block_size=executor.programs.shapes.block_size
    )
    engine = Engine(
        executor=scripted,
        policy=policy,
        allocator=allocator,
        topology=topology,
        vocab_size=vocab_size,
        max_model_len=topology.instances * slots + 1,
        eos_ids=eos_ids,
    )
    with engine:
        scripted.engine = engine
        scripted.begin.set()
        assert scripted.done.wait(PATIENCE_S), "the script does not come to its end"
        assert engine.alive, [role.end for role in roles]
        assert all(answer.end is not None for role in roles for answer in role.answers)
        assert all(allocator.used_slots(i) == 0 for i in range(topology.instances))
        allocator.check_integrity()
        used: dict[int, int] = {}
        fullest = 0
        for sample in engine.pool_samples():
            used[sample.instance] = sample.used
            fullest = max(fullest, sum(used.values()))
        return Run(
            stats=engine.stats(), steps=engine.steps(), failed=scripted.failed, fullest=fullest
        )
