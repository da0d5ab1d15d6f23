"""The table at which one plan is made: what is idle, what is free, and what is spoken for.

Owns the working state of a single `schedule` call and is thrown away after it. It answers
questions about memory and groups; what to do is decided elsewhere (`prompts`, `decodes`).
Counts memory in blocks, as the allocator does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

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
      free: Free blocks by instance.
      running: Requests that decode and that no step works on, in line.
      preempted: Requests whose KV this plan drops.
      stuck: Running requests that have no room, and will have none before others end.
    """

    def __init__(self, snapshot: Snapshot, headroom: int) -> None:
        views = snapshot.instances
        self.snapshot = snapshot
        self.idle = {view.id for view in views if view.busy_seq is None}
        self.drained: set[InstanceId] = set()
        self.soon = {
            view.id
            for view in views
            if view.busy_seq is not None and view.busy_seq != view.prefill_seq
        }
        self.free = {view.id: view.free_slots // snapshot.block_size for view in views}
        self.running = sorted(
            (view for view in snapshot.running if view.id not in snapshot.in_flight), key=line_key
        )
        self.preempted: list[RequestId] = []
        self.stuck: set[RequestId] = set()
        self._headroom = headroom
        self._holders = {view.id: view for view in snapshot.running if view.kv}
        self._capacity = {view.id: view.slots // snapshot.block_size for view in views}
        self._prefill_seq = {
            view.id: view.prefill_seq for view in views if view.prefill_seq is not None
        }
        self._reach: dict[frozenset[InstanceId], frozenset[InstanceId]] = {}

    # ---- memory ----------------------------------------------------------------------

    def blocks(self, tokens: int) -> int:
        """Whole blocks that hold this many tokens."""
        return -(-tokens // self.snapshot.block_size)

    def growth(self, view: RequestView) -> int:
        """Blocks beyond those of its known tokens that a request is granted in advance.

        As many as its next `headroom` tokens need. All that it can ever need, if it can grow
        too long to be computed anew: it must not be preempted then.
        """
        ahead = view.length + self._headroom
        if view.peak > self.longest_prefill:
            ahead = view.peak
        return max(0, self.blocks(min(view.peak, ahead)) - self.blocks(view.computed or view.length))

    def growth_on(self, instances: Iterable[InstanceId]) -> int:
        """Blocks granted in advance to requests with KV on any of these."""
        region = frozenset(instances)
        return sum(
            self.growth(view)
            for view in self._holders.values()
            if any(share.instance in region for share in view.kv)
        )

    @property
    def longest_prefill(self) -> int:
        """Tokens that one prefill step of the largest group takes."""
        return self.snapshot.max_chunk_tokens * self.snapshot.topology.degrees[-1]

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

    def occupied(self, instance: InstanceId) -> bool:
        """Whether anyone that decodes has KV there."""
        return any(share.instance == instance for v in self._holders.values() for share in v.kv)

    def hold_kv(self, view: RequestView) -> None:
        """A request gets KV by this plan; `view` shows it with its new shares."""
        self._holders[view.id] = replace(view, computed=sum(tokens for _, tokens in view.kv))

    def preempt(self, view: RequestView) -> None:
        """Drops a request's KV; its blocks are free at once."""
        self.preempted.append(view.id)
        self.running.remove(view)
        del self._holders[view.id]
        for instance, tokens in view.kv:
            self.free[instance] += self.blocks(tokens)

    # ---- groups ----------------------------------------------------------------------

    def cover(
        self, instances: frozenset[InstanceId], usable: frozenset[InstanceId], degree: int = 1
    ) -> Group | None:
        """The smallest group of usable instances that holds these, filled with others that
        hold nobody's KV where that takes no larger group."""
        topology = self.snapshot.topology
        found = topology.smallest_cover(instances, usable, degree)
        if found is None or len(found) == len(instances):
            return found
        taken = {share.instance for view in self._holders.values() for share in view.kv}
        empty = topology.smallest_cover(instances, (usable - taken) | instances, degree)
        return empty if empty is not None and len(empty) == len(found) else found

    def claim(self, group: Iterable[InstanceId]) -> None:
        """Uses instances in this plan, or keeps them for who needs them next."""
        self.idle.difference_update(group)
        self.drained.difference_update(group)

    # ---- turns -----------------------------------------------------------------------

    def put_off_on(self, view: RequestView) -> frozenset[InstanceId]:
        """Homes of a request where prompts ran since its last step: it goes first there."""
        last = -1 if view.last_seq is None else view.last_seq
        return frozenset(
            share.instance
            for share in view.kv
            if self._prefill_seq.get(share.instance, -1) > last
        )
