"""The engine's books: open requests, steps in flight, and the snapshot made of them.

Owns which request is where in its life; the allocator owns where KV lies. A snapshot costs
one new view for each request or instance that changed, and one pass to build its tuples.
The loop alone touches it, save `published`, which any thread may read.
"""

from __future__ import annotations

from collections.abc import Iterable

from loongjax.engine.ahead import continue_step
from loongjax.engine.request import Request
from loongjax.engine.views import Views
from loongjax.executor.protocol import ExecutorLimits
from loongjax.kvcache import BlockAllocator
from loongjax.kvcache.messages import SlotPlan
from loongjax.plan import (
    DecodeStep,
    Flight,
    Group,
    InstanceId,
    InstanceView,
    MigrateStep,
    PrefillStep,
    RequestId,
    Share,
    Snapshot,
    Step,
    Topology,
    step_requests,
)


class State:
    """Requests from arrival until their slots are free, and steps from launch to result.

    Attributes:
      open: Requests without an end, by arrival.
      flying: Steps in flight, by seq. Those on different groups share no instance; of one
        group there may be several, each queued behind the one before.
      published: The newest snapshot.
      draining: Instances of which no further block is taken; replaced, never changed.
    """

    def __init__(
        self, *, allocator: BlockAllocator, topology: Topology, limits: ExecutorLimits
    ) -> None:
        self._allocator = allocator
        self._topology = topology
        self._limits = limits
        self._version = 0
        self._next_seq = 0
        self._ending: dict[RequestId, Request] = {}
        self._prefill_seq: dict[InstanceId, int] = {}
        self.draining: frozenset[InstanceId] = frozenset()
        self._instances = tuple(
            InstanceView(id=i, slots=allocator.usable, free_slots=allocator.free_slots(i))
            for i in range(topology.instances)
        )
        self.open: dict[RequestId, Request] = {}
        self.flying: dict[int, Step] = {}
        self._launched: dict[int, float] = {}
        self._views = Views()
        self._in_flight: set[RequestId] = set()
        self._masked: set[RequestId] = set()  # open ones whose next token is up to the host
        self.published = self.snapshot()

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._allocator.block_size

    def add(self, request: Request) -> None:
        """Takes a new request in."""
        self.open[request.id] = request
        if request.submission.request.mask is not None:
            self._masked.add(request.id)
        self._views.add(request.id)
        self._version += 1

    def end(self, request: Request) -> bool:
        """Marks a request as ended; says whether its slots may be freed at once.

        They may not while a step in flight writes or reads them: `land` gives it then.
        """
        request.ended = True
        del self.open[request.id]
        self._views.remove(request.id)
        self._in_flight.discard(request.id)
        self._masked.discard(request.id)
        self._version += 1
        if request.in_flight is None:
            return True
        self._ending[request.id] = request
        return False

    def launch(self, step: Step, time: float) -> SlotPlan:
        """Books a step that is about to be submitted; gives the slots it writes."""
        slots, names, seq = self._allocator.apply(step), step_requests(step), step.seq
        computes, requests = not isinstance(step, MigrateStep), self.open
        self._views.stale.update(names)
        self._in_flight.update(names)
        for name in names:
            if not computes:
                self._tell_relatives(name)
            requests[name].launched(seq, time, computes=computes)
        if isinstance(step, PrefillStep):
            self._prefill_seq.update(dict.fromkeys(step.group, step.seq))
        self.flying[seq] = step
        self._launched[seq] = time
        self._next_seq = seq + 1
        self._version += 1
        return slots

    def land(self, seq: int) -> tuple[Step, list[Request]]:
        """A step ended: the step, and those of its requests that ended before it did, unless
        another step works on them still.
        """
        step = self.flying.pop(seq)
        del self._launched[seq]
        self._version += 1
        ended, stale, requests = [], self._views.stale, self.open
        for name in step_requests(step):
            request = requests.get(name)
            if request is not None:
                stale.add(name)
                if request.in_flight == seq:
                    request.in_flight = None
                    self._in_flight.discard(name)
            elif self._ending[name].in_flight == seq:
                ended.append(self._ending.pop(name))
                ended[-1].in_flight = None
        return step, ended

    def queue(self, group: Group) -> list[DecodeStep]:
        """The decode steps in flight on a group, in the order of their launches."""
        return [
            step
            for step in self.flying.values()
            if step.group == group and isinstance(step, DecodeStep)
        ]

    def continuation(self, step: DecodeStep) -> DecodeStep | None:
        """What may be launched behind `step`, the newest on its group (`continue_step`).

        Nothing where some row's next token is up to the host.
        """
        if self._masked and not self._masked.isdisjoint(step_requests(step)):
            return None
        return continue_step(step, seq=self._next_seq, goes_on=self._goes_on, fits=self._fits)

    def _fits(self, step: DecodeStep) -> bool:
        if self.draining and not self.draining.isdisjoint(row.home for row in step.rows):
            return False
        return self._allocator.fits(step)

    def _goes_on(self, name: RequestId) -> bool:
        request = self.open.get(name)
        return request is not None and self._allocator.computed(name) < request.peak

    def drain(self, instance: InstanceId, draining: bool) -> None:
        """Lets an instance run empty, or take KV again."""
        self.draining = self.draining | {instance} if draining else self.draining - {instance}
        self._version += 1

    def release_kv(self, request: Request) -> None:
        """Frees a request's slots."""
        self._tell_relatives(request.id)
        self._allocator.release(request.id)
        request.changed()
        if request.id in self.open:
            self._views.stale.add(request.id)
        self._version += 1

    def fork(self, source: Request, target: Request) -> bool:
        """Lets a request that is open and has no KV share that of another; says whether it
        could: block tables have bounds.
        """
        if not self._allocator.can_fork(source.id):
            return False
        self._allocator.fork(source.id, target.id)
        target.changed()
        self._views.stale.add(target.id)
        self._version += 1
        return True

    def _tell_relatives(self, name: RequestId) -> None:
        """What others see of the blocks that they share with a request is about to change."""
        for other in self._allocator.relatives(name):
            if request := self.open.get(other):
                request.changed()
                self._views.stale.add(other)

    def victims(self, step: Step) -> list[Request]:
        """Open requests that lose KV when `step` fails: it ran them, or shares an instance.

        Different groups in flight are disjoint, and those of computing steps hold all KV of
        their requests. So none of these is in another step in flight, unless that moves its KV
        or is queued behind `step`.
        """
        group = set(step.group)
        ran = set(step_requests(step))
        return [
            request
            for request in self.open.values()
            if request.id in ran or not group.isdisjoint(request.view(self._allocator).homes)
        ]

    def used(self, instances: Iterable[InstanceId] | None = None) -> list[Share]:
        """Slots in held blocks of some instances; None: of all."""
        if instances is None:
            instances = range(self._allocator.instances)
        return [Share(i, self._allocator.used_slots(i)) for i in instances]

    def clear(self) -> None:
        """Frees all slots and forgets all requests and steps; nothing may be in flight."""
        for request in (*self.open.values(), *self._ending.values()):
            self.release_kv(request)
        self.open.clear()
        self._views = Views()
        self._in_flight.clear()
        self._masked.clear()
        self._ending.clear()
        self.flying.clear()
        self._launched.clear()
        self.snapshot()

    def snapshot(self) -> Snapshot:
        """What the policy may look at; also `published` from now on."""
        self._views.refresh(lambda name: self.open[name].view(self._allocator))
        busy = {i: seq for seq, step in self.flying.items() for i in step.group}  # newest last
        self._instances = tuple(self._instance(view, busy.get(view.id)) for view in self._instances)
        self.published = Snapshot(
            version=self._version,
            next_seq=self._next_seq,
            block_size=self._allocator.block_size,
            max_chunk_tokens=self._limits.max_chunk_tokens,
            max_rows=self._limits.max_rows,
            waiting=self._views.waiting,
            running=self._views.running,
            instances=self._instances,
            in_flight=frozenset(self._in_flight),
            topology=self._topology,
            flights=tuple([Flight(s, self._launched[seq]) for seq, s in self.flying.items()]),
        )
        return self.published

    def _instance(self, old: InstanceView, busy: int | None) -> InstanceView:
        free, withheld = self._allocator.free_slots(old.id), 0
        if old.id in self.draining:
            free, withheld = 0, free
        prefill = self._prefill_seq.get(old.id)
        now = (free, withheld, busy, prefill)
        if now == (old.free_slots, old.withheld, old.busy_seq, old.prefill_seq):
            return old
        return InstanceView(
            id=old.id,
            slots=old.slots,
            free_slots=free,
            withheld=withheld,
            busy_seq=busy,
            prefill_seq=prefill,
        )
