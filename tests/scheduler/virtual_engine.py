"""A small engine without threads or devices: real allocator, real rules, any order of ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loongjax.engine.ahead import continue_step
from loongjax.kvcache import BlockAllocator
from loongjax.plan import (
    DecodeStep,
    Flight,
    Group,
    InstanceView,
    MigrateStep,
    Plan,
    PrefillStep,
    RequestView,
    Snapshot,
    Step,
    Topology,
    step_requests,
)
from loongjax.scheduler import Policy, validate


@dataclass(kw_only=True)
class Job:
    """A request: it ends after `tokens` (at most `max_tokens`) were generated."""

    id: str
    prompt: int
    max_tokens: int
    tokens: int
    arrival: float = 0.0
    priority: int = 0
    generated: int = 0
    last_seq: int | None = None
    first_token: float | None = None
    served: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.prompt + self.generated


class VirtualEngine:
    """Plans, checks, and applies; `pick` says which step in flight ends next (of a group, always
    the first), `fail` whether it fails. `steps_ahead` as in `ExecutorLimits`. The clock goes on by
    `tick` whenever a step ends [s].

    Attributes:
      plans: Every snapshot with the plan that was made from it.
      preempted: Requests in the order in which they were preempted.
      moved: Tokens that every migration moved, in the order of their launches.
      fullest: The most slots that were in use at once.
      continued: How many steps were queued behind another.
    """

    def __init__(
        self,
        policy: Policy,
        topology: Topology,
        *,
        slots: int,
        block_size: int,
        max_chunk_tokens: int = 64,
        max_rows: int = 4,
        steps_ahead: int = 1,
        pick: Callable[[Sequence[Step]], int] = lambda steps: 0,
        fail: Callable[[Step], bool] = lambda step: False,
        tick: float = 0.0,
    ) -> None:
        self.policy = policy
        self.topology = topology
        self.allocator = BlockAllocator(
            instances=topology.instances, slots=slots, block_size=block_size
        )
        self.max_chunk_tokens = max_chunk_tokens
        self.max_rows = max_rows
        self.steps_ahead = steps_ahead
        self.pick = pick
        self.fail = fail
        self.tick = tick
        self.now = 0.0
        self.jobs: dict[str, Job] = {}
        self.flying: list[Step] = []
        self.plans: list[tuple[Snapshot, Plan]] = []
        self.preempted: list[str] = []
        self.moved: list[int] = []
        self.finished: list[str] = []
        self.fullest = 0
        self.continued = 0
        self._submitted = 0
        self._launched: dict[int, float] = {}
        self._next_seq = 0
        self._prefill_seq: dict[int, int] = {}
        self._lost: set[str] = set()
        self._doomed: set[int] = set()
        self._ended: set[str] = set()
        self._ahead: frozenset[Group] = frozenset()

    def capacity(self) -> int:
        """KV tokens that the largest group holds."""
        return self.allocator.usable * max(self.topology.degrees)

    def submit(self, job: Job) -> None:
        blocks = -(-(job.prompt + job.max_tokens - 1) // self.allocator.block_size)
        assert blocks * self.allocator.block_size <= self.capacity()
        assert 1 <= job.tokens <= job.max_tokens
        job.arrival = float(self._submitted)
        self._submitted += 1
        self.jobs[job.id] = job

    def snapshot(self) -> Snapshot:
        views = [self._view(job) for name, job in self.jobs.items() if name not in self._ended]
        return Snapshot(
            version=len(self.plans),
            next_seq=self._next_seq,
            block_size=self.allocator.block_size,
            max_chunk_tokens=self.max_chunk_tokens,
            max_rows=self.max_rows,
            waiting=tuple(view for view in views if view.uncomputed > 1 or not view.kv),
            running=tuple(view for view in views if view.uncomputed <= 1 and view.kv),
            instances=tuple(self._instance(i) for i in range(self.topology.instances)),
            in_flight=self._in_flight - self._ended,
            topology=self.topology,
            flights=tuple(Flight(step, self._launched[step.seq]) for step in self.flying),
        )

    def plan(self) -> tuple[Step, ...]:
        """Plans once more than what changed nothing; gives the steps that were launched."""
        while True:
            snapshot = self.snapshot()
            plan = self.policy.schedule(self.now, snapshot)
            validate(snapshot, plan)
            assert not plan.reject
            self.plans.append((snapshot, plan))
            for name in plan.preempt:
                self._preempt(name)
            for step in plan.steps:
                self._launch(step)
            self._ahead = plan.ahead
            if plan.steps or not plan.preempt:
                break
        assert self.flying or not self.jobs, "nothing is planned, and nothing is in flight"
        self.run_ahead()
        return plan.steps

    def run_ahead(self) -> None:
        """Continues what the last plan lets go on."""
        for group in () if self._lost else sorted(self._ahead):
            queue = [step for step in decodes(self.flying) if step.group == group]
            while 0 < len(queue) <= self.steps_ahead:
                step = continue_step(
                    queue[-1], seq=self._next_seq, goes_on=self._goes_on, fits=self.allocator.fits
                )
                if step is None:
                    break
                self._launch(step)
                self.continued += 1
                queue.append(step)

    def end_one(self) -> Step:
        """A step ends: its requests get their tokens, or all with KV there lose it."""
        group = self.flying[self.pick(self.flying) % len(self.flying)].group
        step = next(step for step in self.flying if step.group == group)
        self.flying.remove(step)
        self.now += self.tick
        if step.seq in self._doomed or self.fail(step):
            self._lost |= {name for name in self.jobs if set(group) & set(self.homes(name))}
            self._lost |= set(step_requests(step))
            self._doomed |= {behind.seq for behind in self.flying if behind.group == group}
        else:
            self._serve(step)
        for name in self._ended - self._in_flight:
            self._ended.remove(name)
            self._forget(name)
        for name in (self._lost & self.jobs.keys()) - self._in_flight:
            self.allocator.release(name)
        self._lost &= self._in_flight
        self.allocator.check_integrity()
        return step

    def abort(self, name: str) -> None:
        """Ends a request, at once or when the step that works on it does."""
        self._end(name)

    def homes(self, name: str) -> tuple[int, ...]:
        return tuple(share.instance for share in self.allocator.shares(name))

    def run(self, limit: int = 20_000) -> None:
        """Until everybody has finished, or `limit` steps have ended."""
        for _ in range(limit):
            if not self.jobs:
                break
            self.plan()
            if self.flying:
                self.end_one()
        assert not self.jobs, f"{sorted(self.jobs)} did not end within {limit} steps"
        assert all(self.allocator.used_slots(i) == 0 for i in range(self.topology.instances))

    @property
    def _in_flight(self) -> frozenset[str]:
        return frozenset(name for step in self.flying for name in step_requests(step))

    def _goes_on(self, name: str) -> bool:
        job = self.jobs[name]
        peak = job.prompt + job.max_tokens - 1
        return name not in self._ended and self.allocator.computed(name) < peak

    def _end(self, name: str) -> None:
        if name in self._in_flight:
            self._ended.add(name)
        else:
            self._forget(name)

    def _serve(self, step: Step) -> None:
        ends = {c.request: c.last for c in step.chunks} if isinstance(step, PrefillStep) else {}
        for name in () if isinstance(step, MigrateStep) else step_requests(step):
            if name in self._ended:
                continue
            job = self.jobs[name]
            if not ends.get(name, True):
                assert 0 < self.allocator.computed(name) < job.length
                continue
            behind = sum(name in step_requests(later) for later in self.flying)
            assert self.allocator.computed(name) == job.length + behind
            job.generated += 1
            job.first_token = self.now if job.first_token is None else job.first_token
            job.served.append(step.seq)
            if job.generated == job.tokens:
                self._end(name)
                self.finished.append(name)

    def _launch(self, step: Step) -> None:
        self.allocator.apply(step)
        assert step.seq == self._next_seq
        self._next_seq += 1
        self.flying.append(step)
        self._launched[step.seq] = self.now
        if isinstance(step, MigrateStep):
            self.moved.append(sum(move.tokens for move in step.moves))
        else:
            for name in step_requests(step):
                self.jobs[name].last_seq = step.seq
        if isinstance(step, PrefillStep):
            self._prefill_seq |= dict.fromkeys(step.group, step.seq)
        used = [self.allocator.used_slots(i) for i in range(self.topology.instances)]
        self.fullest = max(self.fullest, sum(used))

    def _preempt(self, name: str) -> None:
        self.preempted.append(name)
        self.allocator.release(name)

    def _forget(self, name: str) -> None:
        self.allocator.release(name)
        del self.jobs[name]

    def _view(self, job: Job) -> RequestView:
        found = self.allocator.whereabouts(job.id)
        return RequestView(
            id=job.id,
            prompt=job.prompt,
            max_tokens=job.max_tokens,
            arrival=job.arrival,
            priority=job.priority,
            generated=job.generated,
            computed=found.computed,
            kv=found.shares,
            tail=found.tail,
            holes=found.holes,
            last_seq=job.last_seq,
            first_token=job.first_token,
        )

    def _instance(self, instance: int) -> InstanceView:
        busy = [step.seq for step in self.flying if instance in step.group]
        return InstanceView(
            id=instance,
            slots=self.allocator.slots,
            free_slots=self.allocator.free_slots(instance),
            busy_seq=max(busy, default=None),
            prefill_seq=self._prefill_seq.get(instance),
        )


def prefills(steps: Sequence[Step]) -> list[PrefillStep]:
    return [step for step in steps if isinstance(step, PrefillStep)]


def migrations(steps: Sequence[Step]) -> list[MigrateStep]:
    return [step for step in steps if isinstance(step, MigrateStep)]


def decodes(steps: Sequence[Step]) -> list[DecodeStep]:
    return [step for step in steps if isinstance(step, DecodeStep)]
