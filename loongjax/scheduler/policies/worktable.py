"""What is left of the cluster while one plan of `LoongServe` grows.

Owns the working state of a single `schedule` call and is thrown away after it: what is idle,
what is free, who decodes where. Decides nothing. Most plans need to know of those alone whose
instances are idle (`near`); what takes more than a glance at everyone is made when it is asked
for (`census`). Counts memory in blocks, as the allocator does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter

import numpy as np
from jaxtyping import Int64

from loongjax.plan import Group, InstanceId, RequestId, RequestView, Snapshot
from loongjax.scheduler.dispatch import Pool


def line_key(view: RequestView) -> tuple[int, float, RequestId]:
    """The place in line: higher priority first, then who came first."""
    return (-view.priority, view.arrival, view.id)


@dataclass(slots=True)
class Tenants:
    """Who has KV on an instance.

    Attributes:
      paused: The sum of 1 / output over who decodes there [1/token].
      blocks: Blocks that those hold there.
      growth: Blocks that everyone there is granted beyond what he has.
      rows: How many decode there.
    """

    paused: float = 0.0
    rows: int = 0
    blocks: int = 0
    growth: int = 0


class Worktable:
    """The cluster, as the plan has left it so far.

    Attributes:
      snapshot: What the plan is made from.
      headroom: Tokens beyond the known ones that a request is granted in advance; None: all
        that it may ever need.
      idle: Instances that no step works on, that nothing in this plan uses, and that are not
        kept for somebody.
      held: Instances kept for prompts; decodes that prompts have put off may still use them.
      soon: Instances that a decode or a migration works on; they will be idle in a moment.
      late: Instances that a prefill step works on.
      free: Free blocks by instance.
      capacity: All blocks by instance.
      resting: Requests that decode and that no step works on, as the plan found them, by
        arrival.
      near: Those of them that have KV on an instance that was idle.
      preempted: Requests whose KV this plan drops.
      placed: Prompts that get KV by this plan, with it.
      stuck: Requests that decode and have no room, and will have none before others end.
    """

    def __init__(self, snapshot: Snapshot, headroom: int | None) -> None:
        self.snapshot = snapshot
        self.headroom = headroom
        size, views = snapshot.block_size, snapshot.instances
        self.free = [view.free_slots // size for view in views]
        self.capacity = [view.slots // size for view in views]
        busy = [view for view in views if view.busy_seq is not None]
        self.late = {view.id for view in busy if view.busy_seq == view.prefill_seq}
        self.soon = {view.id for view in busy if view.busy_seq != view.prefill_seq}
        self.idle = {view.id for view in views if view.busy_seq is None}
        self.held: set[InstanceId] = set()
        self._was_idle = frozenset(self.idle)
        in_flight, idle = snapshot.in_flight, self.idle
        self.resting = [view for view in snapshot.running if view.id not in in_flight]
        self.near = [
            view
            for view in self.resting
            if view.kv[0][0] in idle or (len(view.kv) > 1 and not idle.isdisjoint(view.homes))
        ]
        self.preempted: list[RequestId] = []
        self.placed: dict[RequestId, RequestView] = {}
        self._placed_grow = 0
        self.stuck: set[RequestId] = set()
        self._reach: dict[frozenset[InstanceId], tuple[frozenset[InstanceId], int]] = {}

    # ---- who is where ----------------------------------------------------------------

    @cached_property
    def _special(self) -> list[RequestView]:
        """Waiting requests that have a priority or some KV: few, as a rule."""
        return [view for view in self.snapshot.waiting if view.priority or view.kv]

    @cached_property
    def line(self) -> Sequence[RequestView]:
        """Waiting requests in line, those too that a step works on."""
        if not any(view.priority for view in self._special):
            return self.snapshot.waiting
        # the sort is stable, so that they stay by arrival among equals
        return sorted(self.snapshot.waiting, key=attrgetter("priority"), reverse=True)

    @cached_property
    def begun(self) -> list[RequestView]:
        """Waiting requests that have some KV already, in flight or not."""
        return [view for view in self._special if view.kv]

    @cached_property
    def census(self) -> list[RequestView]:
        """Everyone who has KV, in flight or not, save who this plan preempts or gives more."""
        gone = self.placed.keys() | self.preempted
        views = [*self.snapshot.running, *self.begun]
        return [view for view in views if view.id not in gone] if gone else views

    @cached_property
    def _near_tenants(self) -> dict[InstanceId, Tenants]:
        return self._tenants(self.near)

    @cached_property
    def _all_tenants(self) -> dict[InstanceId, Tenants]:
        return self._tenants(self.snapshot.running)

    def _tenants(self, views: Iterable[RequestView]) -> dict[InstanceId, Tenants]:
        found: dict[InstanceId, Tenants] = {}
        size, headroom = self.snapshot.block_size, self.headroom
        for view in views:  # the numbers of `granted` and `held_blocks`, without their calls
            computed = view.computed
            granted = view.prompt + view.max_tokens - 1
            if headroom is not None:
                known = view.prompt + view.generated
                granted = min(granted, (known if known > computed else computed) + headroom)
            held = -(-computed // size)
            grows = max(0, -(-granted // size) - held)
            paused = 1.0 / (view.generated or 1)
            whole = len(view.kv) == 1 and not view.holes
            for share in view.kv:
                there = found.get(share[0])
                if there is None:
                    there = found[share[0]] = Tenants()
                there.paused += paused
                there.rows += 1
                there.growth += grows
                there.blocks += held if whole else self.held_blocks(view, share[0])
        for view in self.begun:
            grows = self.grows(view)
            for instance, _ in view.kv:
                found.setdefault(instance, Tenants()).growth += grows
        return found

    def tenants(self, instance: InstanceId) -> Tenants:
        """Who decodes on an instance, as the plan found it."""
        known = self._near_tenants if instance in self._was_idle else self._all_tenants
        return known.get(instance, _NOBODY)

    def is_empty(self, instance: InstanceId) -> bool:
        """Whether nobody has KV there."""
        return self.free[instance] == self.capacity[instance]

    def put_off_on(self, view: RequestView) -> list[InstanceId]:
        """Homes of a request where prompts ran since its last step: it goes first there."""
        last = -1 if view.last_seq is None else view.last_seq
        instances = self.snapshot.instances
        found = []
        for share in view.kv:
            prompt = instances[share[0]].prefill_seq
            if prompt is not None and prompt > last:
                found.append(share[0])
        return found

    # ---- memory ----------------------------------------------------------------------

    def blocks(self, tokens: int) -> int:
        """Whole blocks that hold this many tokens."""
        return -(-tokens // self.snapshot.block_size)

    def held_blocks(self, view: RequestView, instance: InstanceId) -> int:
        """Blocks that a request holds on an instance."""
        slots = sum([tokens for home, tokens in view.kv if home == instance])
        if view.holes:
            slots += sum(hole.tokens for hole in view.holes if hole.instance == instance)
        if view.tail is not None and view.tail[0] == instance:
            slots += view.tail[1]
        return slots // self.snapshot.block_size

    @cached_property
    def longest_prefill(self) -> int:
        """Tokens that one prefill step of the largest group takes."""
        return self.snapshot.max_chunk_tokens * self.snapshot.topology.degrees[-1]

    def granted(self, view: RequestView) -> int:
        """KV tokens that a request may have in the end, as far as memory is kept for it."""
        if self.headroom is None:
            return view.peak
        return min(view.peak, max(view.computed, view.length) + self.headroom)

    def spare(self, instance: InstanceId) -> int:
        """Free blocks that nobody is granted. What has KV on several instances may grow on
        each of them.
        """
        return max(0, self.free[instance] - self.tenants(instance).growth)

    def has_plenty(self, blocks: int) -> bool:
        """Whether the pool has so many blocks even if everyone takes all the headroom: a
        glance that often saves the memory test.
        """
        if self.headroom is None:
            return False
        grows = len(self.snapshot.running) * (self.blocks(self.headroom) + 1)
        return sum(self.free) - grows - self._begun_grow - self._placed_grow >= blocks

    @cached_property
    def _begun_grow(self) -> int:
        return sum([self.grows(view) for view in self.begun])

    def grows(self, view: RequestView) -> int:
        """Blocks that a request may have in the end beyond those of what is computed."""
        return max(0, self.blocks(self.granted(view)) - self.blocks(view.computed))

    def pool(self, region: frozenset[InstanceId]) -> Pool:
        """The memory of a region, and who holds some of it.

        What a request holds elsewhere does not count, but all that it may add does.
        """
        return self._whole_pool if len(region) == len(self.free) else self._pool(region)

    @cached_property
    def _whole_pool(self) -> Pool:
        return self._pool(self.everything)

    def _pool(self, region: frozenset[InstanceId]) -> Pool:
        views = [*self.census, *self.placed.values()]
        if len(region) < len(self.free):
            views = [view for view in views if not region.isdisjoint(view.homes)]
        held, left = self._held_and_left(views)
        if len(region) < len(self.free):
            held -= _array([sum(s[1] for s in v.kv if s[0] not in region) for v in views])
        size = self.snapshot.block_size
        capacity = sum(self.capacity[instance] for instance in region) * size
        return Pool(capacity=capacity, block_size=size, held=held, left=left)

    def _held_and_left(
        self, views: Sequence[RequestView]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """KV tokens of each, those of its prompt at least, and those that it may still add."""
        prompt = _array([view.prompt for view in views])
        computed = _array([view.computed for view in views])
        ends = prompt + _array([view.max_tokens for view in views]) - 1
        if self.headroom is not None:
            known = np.maximum(computed, prompt + _array([view.generated for view in views]))
            ends = np.minimum(ends, known + self.headroom)
        held = np.maximum(computed, prompt)
        return held, np.maximum(ends - held, 0)

    @cached_property
    def everything(self) -> frozenset[InstanceId]:
        """All instances."""
        return frozenset(range(len(self.free)))

    def reach(self, instances: frozenset[InstanceId]) -> frozenset[InstanceId]:
        """A largest group that holds these: where KV that lies on them can grow to."""
        return self._region(instances)[0]

    def can_hold_peak(self, instances: frozenset[InstanceId], view: RequestView) -> bool:
        """Whether a request with KV on `instances` could end there, were it alone."""
        return self._region(instances)[1] >= self.blocks(view.peak)

    def _region(self, instances: frozenset[InstanceId]) -> tuple[frozenset[InstanceId], int]:
        """The reach of these, and its blocks."""
        found = self._reach.get(instances)
        if found is None:
            topology = self.snapshot.topology
            covers = (topology.smallest_cover(instances, None, d) for d in topology.degrees[::-1])
            region = next((cover for cover in covers if cover is not None), ())
            found = (frozenset(region), sum(self.capacity[instance] for instance in region))
            self._reach[instances] = found
        return found

    def cover(
        self, instances: frozenset[InstanceId], usable: frozenset[InstanceId], degree: int = 1
    ) -> Group | None:
        """The smallest group of usable instances that holds these, filled up with others
        where nobody has KV if that takes no larger group.
        """
        topology = self.snapshot.topology
        found = topology.smallest_cover(instances, usable, degree)
        if found is None or len(found) == len(instances):
            return found
        empty = frozenset(filter(self.is_empty, usable)) | instances
        quiet = topology.smallest_cover(instances, empty, degree)
        return quiet if quiet is not None and len(quiet) == len(found) else found

    # ---- what the plan does to it ----------------------------------------------------

    def place(
        self, view: RequestView, taken: Iterable[tuple[InstanceId, int]], *, new: bool = False
    ) -> None:
        """A prompt gets KV by this plan; `view` shows it with that, `taken` are the blocks. If it
        is `new`, it had none.
        """
        for instance, blocks in taken:
            self.free[instance] -= blocks
        if (before := self.placed.get(view.id)) is not None:
            self._placed_grow -= self.grows(before)
        self.placed[view.id] = view
        self._placed_grow += self.grows(view)
        whole: Pool | None = self.__dict__.get("_whole_pool")
        self._forget("census", "_whole_pool")
        if new and whole is not None:
            held, left = self._held_and_left([view])
            self._whole_pool = replace(
                whole, held=np.append(whole.held, held), left=np.append(whole.left, left)
            )

    def claim(self, group: Iterable[InstanceId]) -> None:
        """Uses instances in this plan, or keeps them for who needs them next."""
        self.idle.difference_update(group)
        self.held.difference_update(group)

    def hold(self, instances: Iterable[InstanceId]) -> None:
        """Keeps those that are idle for prompts."""
        kept = self.idle.intersection(instances)
        self.idle -= kept
        self.held |= kept

    def preempt(self, view: RequestView) -> None:
        """Drops a request's KV; its blocks are free at once."""
        self.preempted.append(view.id)
        self.near = [other for other in self.near if other is not view]
        for instance, _ in view.kv:
            self.free[instance] += self.held_blocks(view, instance)
        self._forget("census", "_whole_pool", "_near_tenants", "_all_tenants")

    def _forget(self, *names: str) -> None:
        """Makes these anew when they are asked for again."""
        for name in names:
            self.__dict__.pop(name, None)


def preempt_last(table: Worktable) -> None:
    """Nothing can run and nothing is in flight: the last in line makes room for the others.

    Happens when prompts that were begun elsewhere fill the pool.
    """
    last = max(table.census, key=line_key, default=None)
    if last is not None:
        table.preempt(last)


_NOBODY = Tenants()


def _array(numbers: list[int]) -> Int64[np.ndarray, " n"]:
    return np.array(numbers, np.int64)
