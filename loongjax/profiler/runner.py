"""Single steps on an executor, timed: the engine's own messages without an engine.

Owns the requests of the point that is being measured. One step runs at a time, but for `together`
and `beside`. Times are the executor's own: from a step's launch until its tokens are on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Protocol, runtime_checkable

from loongjax.errors import StepError
from loongjax.executor.protocol import ExecutorLimits, RequestInput
from loongjax.kvcache import BlockAllocator
from loongjax.kvcache.messages import SlotPlan
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Group,
    InstanceId,
    MigrateStep,
    Move,
    Placement,
    PrefillStep,
    RequestId,
    Share,
    Step,
    StepResult,
    Topology,
)
from loongjax.sampling.params import SamplingParams

_PATIENCE_S = 600.0
_GREEDY = SamplingParams(temperature=0)


@runtime_checkable
class StepExecutor(Protocol):
    """What a profile needs of an `Executor`."""

    @property
    def limits(self) -> ExecutorLimits:
        """What one step may hold."""
        ...

    def now(self) -> float:
        """The clock [s]."""
        ...

    def admit(self, request: RequestInput) -> None:
        """Makes a request known."""
        ...

    def submit(self, step: Step, slots: SlotPlan) -> None:
        """Launches a step."""
        ...

    def poll(self, timeout: float) -> list[StepResult]:
        """Finished steps; waits up to `timeout` seconds for the first."""
        ...

    def forget(self, request: RequestId) -> None:
        """Forgets a request altogether."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """Steps that ran one after the other beside a longer one.

    Attributes:
      steps: How many; the last one may have gone on when the longer one had ended.
      during: Their time until then [s].
      after: The last one's time from then on [s].
    """

    steps: int
    during: float
    after: float

    def slowness(self, alone: float) -> float:
        """How many times as long as `alone` they took beside the longer one; what was left of
        the last one then went on as if alone.
        """
        done = self.steps * alone - self.after
        return self.during / done if done > 0.0 else 1.0


@dataclass(kw_only=True, slots=True)
class Runner:
    """See the module.

    Attributes:
      executor: What runs the steps, made for nobody else.
      topology: Its groups.
      allocator: The slots of its pool.
      vocab_size: Prompts are of ids below it.
    """

    executor: StepExecutor
    topology: Topology
    allocator: BlockAllocator
    vocab_size: int
    _seq: int = 0
    _opened: int = 0
    _lengths: dict[RequestId, int] = field(default_factory=dict)
    _landed: dict[int, StepResult] = field(default_factory=dict)

    def group(self, degree: int) -> Group:
        """The first of a degree."""
        return self.topology.groups(degree)[0]

    def open(self, tokens: int) -> RequestId:
        """A new request whose prompt has so many tokens."""
        self._opened += 1
        name = f"profile-{self._opened}"
        ids = [(self._opened * 7919 + i * 31) % self.vocab_size for i in range(tokens)]
        self.executor.admit(RequestInput(id=name, token_ids=ids, params=_GREEDY, seed=0))
        self._lengths[name] = tokens
        return name

    def close_all(self) -> None:
        """Ends all requests."""
        for name in self._lengths:
            self.allocator.release(name)
            self.executor.forget(name)
        self._lengths.clear()

    # ---- steps -----------------------------------------------------------------------

    def prefill_step(self, group: Group, chunks: Sequence[tuple[RequestId, int]]) -> PrefillStep:
        """The next tokens of each; KV lies evenly."""
        made, keep = [], []
        for name, length in chunks:
            start = self.allocator.computed(name)
            last = start + length == self._lengths[name]
            made.append(Chunk(request=name, start=start, length=length, last=last))
            keep.append(Placement(request=name, shares=self._shares(group, length)))
        seq = self._next()
        return PrefillStep(seq=seq, group=group, chunks=tuple(made), keep=tuple(keep))

    def prefill(self, group: Group, chunks: Sequence[tuple[RequestId, int]]) -> float:
        """See `prefill_step`; says how long it took [s]."""
        return self.together([self.prefill_step(group, chunks)])

    def decode_step(self, group: Group, names: Sequence[RequestId], masters: int) -> DecodeStep:
        """One token for each, on so many masters; its KV goes to instances in turn."""
        rows = tuple(
            DecodeRow(name, group[i % masters], group[i % len(group)])
            for i, name in enumerate(names)
        )
        return DecodeStep(seq=self._next(), group=group, rows=rows)

    def decode(self, group: Group, names: Sequence[RequestId], masters: int) -> float:
        """See `decode_step`; says how long it took [s]."""
        return self.together([self.decode_step(group, names, masters)])

    def together(self, steps: Sequence[Step]) -> float:
        """Runs steps of disjoint groups at once: the mean of their times [s]."""
        for step in steps:
            self._submit(step)
        return mean([_seconds(self._wait_for(step)) for step in steps])

    def beside(self, step: Step, following: Callable[[], Step]) -> tuple[float, Beside]:
        """Runs a step and, until it ends, others of a disjoint group one after the other: its
        time [s], and theirs.
        """
        self._submit(step)
        others = []
        while step.seq not in self._landed:
            other = following()
            self._submit(other)
            others.append(self._wait_for(other))
        result = self._wait_for(step)
        after = sum([max(0.0, other.ended - result.ended) for other in others])
        during = sum(map(_seconds, others)) - after
        return _seconds(result), Beside(steps=len(others), during=during, after=after)

    def migrate(self, name: RequestId, source: InstanceId, target: InstanceId) -> float:
        """Moves all that `source` holds of a request [s]."""
        tokens = dict(self.allocator.shares(name))[source]
        group = self.topology.smallest_cover(frozenset({source, target}))
        if group is None:
            raise StepError(f"no group holds instances {source} and {target}")
        moves = (Move(name, source, target, tokens),)
        return self.together([MigrateStep(seq=self._next(), group=group, moves=moves)])

    def _submit(self, step: Step) -> None:
        self.executor.submit(step, self.allocator.apply(step))

    def _wait_for(self, step: Step) -> StepResult:
        deadline = self.executor.now() + _PATIENCE_S
        while step.seq not in self._landed:
            if self.executor.now() > deadline:
                raise StepError(f"step {step.seq} did not end in {_PATIENCE_S} s")
            for result in self.executor.poll(timeout=1.0):
                if result.error is not None:
                    raise StepError(f"a step that was to be measured failed: {result.error}")
                self._landed[result.seq] = result
        return self._landed.pop(step.seq)

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _shares(self, group: Group, length: int) -> tuple[Share, ...]:
        """Even parts, in whole blocks but the last."""
        size = self.allocator.block_size
        each = -(-length // (len(group) * size)) * size
        found = []
        for instance in group:
            if length > 0:
                found.append(Share(instance, min(each, length)))
                length -= each
        return tuple(found)


def _seconds(result: StepResult) -> float:
    return result.ended - result.started
