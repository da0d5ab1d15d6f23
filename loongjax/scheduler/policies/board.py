"""The table at which one plan is made: what is idle, what is free, and what is spoken for.

Owns the working state of a single `schedule` call and is thrown away after it. It answers
questions about memory and groups; what to do is decided elsewhere (`prompts`, `decodes`).
Counts memory in blocks, as the allocator does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import cached_property

from loongjax.plan import Group, InstanceId, RequestId, RequestView, Snapshot


def line_key(view: RequestView) -> tuple[int, float, RequestId]:
    """The place in line: higher priority first, then who came first."""
    return (-view.priority, view.arrival, view.id)


class Board:
    """What is left of the cluster while a plan grows.

    Attributes:
      snapshot: What the plan is made from.
      idle: Instances that no step works on, that nothing in this plan uses, and that are
        not kept for somebody.
      drained: Instances kept for the first prompt in line; decodes that prompts have put off
        already may still use them.
      soon: Instances that a decode step works on; they will be idle in a moment.
      late: Instances that a prefill step works on.
      free: Free blocks by instance.
      roomy: Instances that have any.
      running: Requests that decode and that no step works on, in line.
      preempted: Requests whose KV this plan drops.
      seated: Requests that this plan has a step for.
      stuck: Running requests that have no room, and will have none before others end.
      wanted: Instances, idle or not, that somebody waits for.
    """

    def __init__(self, snapshot: Snapshot, headroom: int) -> None:
        views = snapshot.instances
        self.snapshot = snapshot
        self.idle = {view.id for view in views if view.busy_seq is None}
        self.drained: set[InstanceId] = set()
        busy = [view for view in views if view.busy_seq is not None]
        self.soon = {view.id for view in busy if view.busy_seq != view.prefill_seq}
        self.late = {view.id for view in busy if view.busy_seq == view.prefill_seq}
        self.free = {view.id: view.free_slots // snapshot.block_size for view in views}
        self.roomy = {instance for instance, blocks in self.free.items() if blocks}
        self.running = sorted(
            (view for view in snapshot.running if view.id not in snapshot.in_flight), key=line_key
        )
        self.preempted: list[RequestId] = []
        self.seated: set[RequestId] = set()
        self.stuck: set[RequestId] = set()
        self.wanted: set[InstanceId] = set()
        self._headroom = headroom
        self._capacity = {view.id: view.slots // snapshot.block_size for view in views}
        self._prefill_seq = {
            view.id: view.prefill_seq for view in views if view.prefill_seq is not None
        }
        self._reach: dict[frozenset[InstanceId], frozenset[InstanceId]] = {}
        self._spare: dict[frozenset[InstanceId], int] = {}

    @cached_property
    def _grants(self) -> dict[RequestId, tuple[frozenset[InstanceId], int]]:
        """For everyone with KV: its homes, and the blocks granted in advance."""
        return {
            view.id: (view.homes, self.grant(view))
            for view in (*self.snapshot.running, *self.snapshot.waiting)
            if view.kv and view.id not in self.preempted
        }

    @property
    def occupied(self) -> frozenset[InstanceId]:
        """Instances with anyone's KV."""
        return frozenset[InstanceId]().union(*(homes for homes, _ in self._grants.values()))

    # ---- memory ----------------------------------------------------------------------

    def blocks(self, tokens: int) -> int:
        """Whole blocks that hold this many tokens."""
        return -(-tokens // self.snapshot.block_size)

    def grant(self, view: RequestView) -> int:
        """Blocks beyond those that it holds that a request is granted in advance.

        As many as the rest of its prompt and then `headroom` tokens need.
        """
        begun = view.computed if view.kv and view.uncomputed <= 1 else view.length
        longest = min(view.peak, begun + self._headroom)
        return max(0, self.blocks(longest) - self.blocks(view.computed))

    def granted_on(self, instances: Set[InstanceId]) -> int:
        """Blocks granted in advance to everyone with KV on any of these."""
        return sum(
            blocks for homes, blocks in self._grants.values() if not homes.isdisjoint(instances)
        )

    def spare_around(self, instances: frozenset[InstanceId]) -> int:
        """Free blocks within reach of these, less what is granted in advance there."""
        region = self.reach(instances)
        if region not in self._spare:
            free = sum(self.free[instance] for instance in region)
            self._spare[region] = free - self.granted_on(region)
        return self._spare[region]

    def spare_for(self, view: RequestView, instances: Set[InstanceId]) -> int:
        """Free blocks on these, less what is granted in advance to others with KV there."""
        free = sum(self.free[instance] for instance in instances)
        homes, own = self._grants[view.id]
        return free - self.granted_on(instances) + (0 if homes.isdisjoint(instances) else own)

    def reach(self, instances: frozenset[InstanceId]) -> frozenset[InstanceId]:
        """A largest group that holds these: where KV that lies on them can grow to."""
        found = self._reach.get(instances)
        if found is None:
            topology = self.snapshot.topology
            covers = (topology.smallest_cover(instances, None, d) for d in topology.degrees[::-1])
            found = frozenset(next((cover for cover in covers if cover is not None), ()))
            self._reach[instances] = found
        return found

    def can_hold_peak(self, instances: frozenset[InstanceId], view: RequestView) -> bool:
        """Whether a request with KV on `instances` could end there, were it alone."""
        capacity = sum(self._capacity[instance] for instance in self.reach(instances))
        return capacity >= self.blocks(view.peak)

    def take(self, instance: InstanceId, blocks: int) -> None:
        """Uses free blocks."""
        self.free[instance] -= blocks
        if not self.free[instance]:
            self.roomy.discard(instance)

    def hold_kv(self, view: RequestView, blocks: Mapping[InstanceId, int]) -> None:
        """A request gets KV by this plan, in new blocks; `view` shows what it has then."""
        for instance, wanted in blocks.items():
            self.take(instance, wanted)
        self.seated.add(view.id)
        self._grants[view.id] = (view.homes, self.grant(view))
        self._spare.clear()

    def preempt(self, view: RequestView) -> None:
        """Drops a request's KV; its blocks are free at once, save those that others share."""
        del self._grants[view.id]
        self._spare.clear()
        self.preempted.append(view.id)
        if view in self.running:
            self.running.remove(view)
        for instance, blocks in self.freed_by(view).items():
            self.free[instance] += blocks
            self.roomy.add(instance)

    def freed_by(self, view: RequestView) -> dict[InstanceId, int]:
        """Blocks that are free, by instance, when this request alone drops its KV; none empty."""
        shared = dict(view.shared)
        own = {home: self.blocks(n) - self.blocks(shared.get(home, 0)) for home, n in view.kv}
        return {home: blocks for home, blocks in own.items() if blocks > 0}

    def blocks_on(self, instances: Set[InstanceId], view: RequestView) -> int:
        """Blocks that a request holds on these, shared or not."""
        return sum(self.blocks(tokens) for home, tokens in view.kv if home in instances)

    def behind(self, view: RequestView) -> list[RequestView]:
        """Those behind a request in line that could give up KV for it, in line."""
        holders = (*self.snapshot.running, *self.snapshot.waiting)
        others = (
            other
            for other in holders
            if other.kv
            and line_key(other) > line_key(view)
            and other.id not in self.preempted
            and other.id not in self.seated
        )
        return sorted(others, key=line_key)

    # ---- groups ----------------------------------------------------------------------

    def cover(
        self, instances: frozenset[InstanceId], usable: frozenset[InstanceId], degree: int = 1
    ) -> Group | None:
        """The smallest group of usable instances that holds these, filled with others that
        hold nobody's KV where that takes no larger group.
        """
        topology = self.snapshot.topology
        found = topology.smallest_cover(instances, usable, degree)
        if found is None or len(found) == len(instances):
            return found
        empty = topology.smallest_cover(instances, (usable - self.occupied) | instances, degree)
        return empty if empty is not None and len(empty) == len(found) else found

    def claim(self, group: Iterable[InstanceId]) -> None:
        """Uses instances in this plan, or keeps them for who needs them next."""
        self.idle.difference_update(group)
        self.drained.difference_update(group)

    def drain(self, instances: Set[InstanceId]) -> None:
        """Keeps idle instances for the first prompt in line."""
        self.idle -= instances
        self.drained |= instances

    # ---- turns -----------------------------------------------------------------------

    def put_off_on(self, view: RequestView) -> frozenset[InstanceId]:
        """Homes of a request where prompts ran since its last step: it goes first there."""
        last = -1 if view.last_seq is None else view.last_seq
        return frozenset(
            share.instance for share in view.kv if self._prefill_seq.get(share.instance, -1) > last
        )
