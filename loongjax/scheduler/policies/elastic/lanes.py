"""Which instances prompts get: a lane of several for one that takes long, one for all others.

A lane is a group on which prompts that take long are computed chunk by chunk, several in one step
if they fit. Their KV lies evenly on it, so that every chunk can run there. A prompt gets as many
instances as it can use: the constant part of a step, on all of them, is to be small beside the
work. But several of them are computed beside each other, on narrow lanes: whoever decodes where its
KV lies holds up fewer instances. Those that decode and hold little keep as many instances as they
need; and whoever waits for a lane makes those in use larger, or waits there in order, if there is
no room for another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.plan import InstanceId, RequestId, RequestView
from loongjax.scheduler.policies.seats import parts
from loongjax.scheduler.policies.worktable import Worktable
from loongjax.scheduler.scaling import tokens_in_time

_CONSTANT_PART = 0.15
"""Part of a prompt's work that constants may come to on the instances that it gets."""
_DECODING_PART = 0.9
"""Part of the time from token to token that steps of those who decode may take on instances that
are left to them, or that they move to."""


@dataclass(kw_only=True, slots=True)
class _Lane:
    """A lane, and how many prompts are for it."""

    members: frozenset[InstanceId]
    waiting: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Need:
    """Of a prompt: instances that it needs at least, those that it can use, and blocks of KV."""

    least: int
    usable: int
    blocks: int


class Lanes:
    """The lanes of one plan.

    Attributes:
      why: Why prompts got their lane.
    """

    def __init__(self, table: Worktable, cost: CostModel, pace_s: float) -> None:
        self.why: dict[RequestId, str] = {}
        self._needs: dict[RequestId, _Need] = {}
        self._rooms: dict[tuple[frozenset[InstanceId], int], int] = {}
        self._table = table
        self._cost = cost
        self._pace_s = pace_s

    # ---- sizes -----------------------------------------------------------------------

    @cached_property
    def in_time(self) -> int:
        """KV tokens of one request on one instance that a decode step reads in time."""
        most = max(self._table.capacity) * self._table.snapshot.block_size
        return tokens_in_time(self._pace_s, most, self._cost)

    @property
    def decode_s(self) -> float:
        """What a step of those who decode on one instance may take [s]."""
        return _DECODING_PART * self._pace_s

    def is_small(self, tokens: int) -> bool:
        """Whether KV of one request may lie beside that of others on one instance."""
        return 2 * tokens <= self.in_time

    def need(self, view: RequestView) -> _Need:
        """How many instances a prompt needs, and can use."""
        found = self._needs.get(view.id)
        if found is None:
            blocks = self._blocks(view)
            work = self._cost.prefill(1, [ChunkWork(view.length, 0)])
            fitting = [d for d, constant in self._constants if constant <= _CONSTANT_PART * work]
            usable = fitting[-1] if fitting else 1
            found = _Need(least=self.least(view), usable=usable, blocks=blocks)
            self._needs[view.id] = found
        return found

    def least(self, view: RequestView) -> int:
        """Instances that a prompt needs for its memory, and to decode in time if possible."""
        everything = len(self._table.free)
        least = -(-self._blocks(view) // max(self._table.capacity))
        if view.length <= self.in_time * everything:
            least = max(least, -(-view.length // max(1, self.in_time)))
        return min(least, everything)

    def _blocks(self, view: RequestView) -> int:
        return self._table.blocks(self._table.granted(view))

    @cached_property
    def _constants(self) -> list[tuple[int, float]]:
        """The constant part of a step on all its instances [s], by degree."""
        degrees = self._table.snapshot.topology.degrees
        return [(d, d * self._cost.prefill(d, [ChunkWork(1, 0)])) for d in degrees]

    @cached_property
    def decoding(self) -> int:
        """Instances that are left to those who decode and hold little: as many as they need
        together, up to half of them.
        """
        most = len(self._table.free) // 2
        small = [v.computed for v in self._table.snapshot.running if self.is_small(v.computed)]
        if not small:
            return 0
        rows, tokens, longest = len(small), sum(small), max(small)
        for instances in range(1, most):
            work = DecodeWork(-(-rows // instances), tokens // instances, 1, longest)
            if self._cost.decode(1, work) <= self.decode_s:
                return instances
        return most

    # ---- lanes -----------------------------------------------------------------------

    @cached_property
    def _spread(self) -> list[frozenset[InstanceId]]:
        """Where those lie who have KV on several instances, begun or decoding."""
        begun = [view for view in self._table.begun if view.uncomputed > 1]
        views = (*begun, *self._table.snapshot.running)
        return [view.homes for view in views if len(view.kv) > 1]

    @cached_property
    def _ranked(self) -> list[InstanceId]:
        """All instances, those best for prompts that take long first: where others lie, and with
        the fewest decodes.
        """
        table = self._table

        def rank(instance: InstanceId) -> tuple[int, int, int, int]:
            lying = sum([instance in homes for homes in self._spread])
            return (-lying, table.tenants(instance).rows, -table.free[instance], instance)

        return sorted(table.everything, key=rank)

    @cached_property
    def _most(self) -> int:
        """How many instances lanes may have in all."""
        return len(self._table.free) - self.decoding

    @cached_property
    def left(self) -> frozenset[InstanceId]:
        """Instances that are left to those who decode and hold little."""
        return frozenset(self._ranked[self._most :])

    @cached_property
    def in_use(self) -> list[frozenset[InstanceId]]:
        """Instances of requests that lie on several; those that share any are one lane. What is
        left to decodes is no part of it, though a request that needs more lies there too.
        """
        if not self._spread:
            return []
        return [lane - self.left for lane in parts(self._spread) if lane - self.left]

    @cached_property
    def busy(self) -> frozenset[InstanceId]:
        """Instances of any lane in use."""
        return frozenset[InstanceId]().union(*self.in_use)

    def choose(self, longs: Sequence[RequestView]) -> dict[RequestId, frozenset[InstanceId]]:
        """A lane for each prompt that takes long, the most urgent first; none for some."""
        lanes = [_Lane(members=members) for members in self.in_use]
        each = max(1, self._most // max(1, len(longs)))
        found: list[tuple[RequestView, _Lane]] = []
        for view in longs:
            if view.kv:
                lane = next((lane for lane in lanes if lane.members & view.homes), None)
            else:
                lane = self._lane_for(view, lanes, each)
            if lane is not None:
                lane.waiting += 1
                found.append((view, lane))
        chosen: dict[RequestId, frozenset[InstanceId]] = {}
        for view, lane in found:
            if (members := self._widened(view, lane.members)) is not None:
                chosen[view.id] = members
                self.why[view.id] = (
                    f"a lane, {len(members)} wide: it can use {self.need(view).usable}, needs "
                    f"{self.need(view).least}; {self.decoding} left to decodes"
                )
        return chosen

    def _widened(
        self, view: RequestView, members: frozenset[InstanceId]
    ) -> frozenset[InstanceId] | None:
        """A lane, and more if a prompt needs that or lies there: for itself alone."""
        if view.kv:
            return members | view.homes
        need = self.need(view)
        wider: frozenset[InstanceId] | None = members
        for size in range(need.least, len(self._table.free) + 1):
            if size > len(members):
                wider = self._cover(members, self._ranked, size)
            if wider is not None and self.room_on(wider) >= need.blocks:
                return wider
        return None

    def room_on(self, lane: frozenset[InstanceId]) -> int:
        """Blocks of a lane that nobody with KV there may still need."""
        table = self._table
        key = (lane, len(table.placed))  # nobody else takes memory or gives it back
        if (room := self._rooms.get(key)) is None:
            room = sum([table.free[i] for i in lane])
            for view in (*table.census, *table.placed.values()):
                if not view.homes.isdisjoint(lane):
                    room -= table.grows(view)
            self._rooms[key] = room
        return room

    def _lane_for(self, view: RequestView, lanes: list[_Lane], each: int) -> _Lane | None:
        """The lane of a new prompt: a new one, or one that grows for it. `each`: instances for each
        of those that take long. None takes all if it need not: others will come.
        """
        need = self.need(view)
        wanted = min(need.usable, each, len(self._table.free) - 1)
        size = max(1, min(max(need.least, wanted), self._most))
        spare = self._spare(lanes)
        return self._new_lane(lanes, spare, size) or self._shared_lane(lanes, spare, size)

    def _new_lane(self, lanes: list[_Lane], spare: list[InstanceId], size: int) -> _Lane | None:
        """On instances that are spare, or on any if there is no lane yet."""
        members = None
        if spare and (not lanes or len(spare) >= size):
            members = self._cover(frozenset(), spare, min(size, len(spare)))
        if members is None and not lanes:
            members = self._cover(frozenset(), self._ranked, size)
        if members is None:
            return None
        lanes.append(_Lane(members=members))
        return lanes[-1]

    def _shared_lane(self, lanes: list[_Lane], spare: list[InstanceId], size: int) -> _Lane | None:
        """The one for which the fewest wait, made wider if that is possible."""
        if not lanes:
            return None
        lane = min(lanes, key=lambda lane: lane.waiting / len(lane.members))
        wanted = min(size, len(lane.members) + len(spare))
        if wanted > len(lane.members):
            lane.members = self._cover(lane.members, spare, wanted) or lane.members
        return lane

    def _spare(self, lanes: Iterable[_Lane]) -> list[InstanceId]:
        """Instances that a new lane may take, the best first."""
        taken = frozenset[InstanceId]().union(*(lane.members for lane in lanes))
        others = [instance for instance in self._ranked if instance not in taken]
        return others[: max(0, len(others) - self.decoding)]

    def _cover(
        self, base: frozenset[InstanceId], more: Sequence[InstanceId], size: int
    ) -> frozenset[InstanceId] | None:
        """A group of so many around `base`, with the first of `more` if they form one."""
        topology = self._table.snapshot.topology
        best = sorted(base.union([i for i in more if i not in base][: max(0, size - len(base))]))
        if len(best) == size and topology.contains(tuple(best)):
            return frozenset(best)
        seed = base or frozenset(more[:1])
        cover = topology.smallest_cover(seed, base.union(more), size)
        return None if cover is None else frozenset(cover)
