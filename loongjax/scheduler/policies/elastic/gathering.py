"""Decodes move away from lanes: who decodes on one would have to get a token in every step of it,
or hold up its chunks.

A request moves in one piece, to an instance where others decode already, if that still keeps the
pace. Source and target have to be idle at the same moment; so whoever is idle first does nothing
that lasts longer than until the other one is (`meetings`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property

from loongjax.costmodel.protocol import CostModel, DecodeWork
from loongjax.plan import InstanceId, MigrateStep, Move, RequestId, RequestView
from loongjax.scheduler.policies.elastic.clock import Clock
from loongjax.scheduler.policies.elastic.lanes import Lanes
from loongjax.scheduler.policies.worktable import Worktable

_EARLY = 0.1
"""Part of the time from token to token by which one is to be idle before the other: whoever comes
too late misses it, for that one does not know."""


class Gathering:
    """The moves of one plan.

    Attributes:
      meetings: Instances that are to be idle together with others, and when [s from now].
    """

    def __init__(self, table: Worktable, cost: CostModel, clock: Clock, lanes: Lanes) -> None:
        self._table = table
        self._cost = cost
        self._clock = clock
        self._lanes = lanes
        self.meetings: dict[InstanceId, float] = {}

    def meet(self, instances: Iterable[InstanceId]) -> None:
        """Lets idle ones of these wait for those that are busy, unless they wait already."""
        waits = [self._clock.idle_in[i] for i in instances if i in self._clock.idle_in]
        for instance in instances if waits else ():
            self.meetings.setdefault(instance, max(waits) - _EARLY * self._clock.pace_s)

    def move(self, lanes: frozenset[InstanceId], seq: int) -> MigrateStep | None:
        """Moves whom it can from these instances, all to one."""
        table = self._table
        others = table.everything - lanes
        if not others or not lanes:
            return None
        movers = [
            view
            for view in table.near
            if not view.homes.isdisjoint(lanes)
            and table.idle.issuperset(view.homes)
            and self._lanes.is_small(view.computed)
            and not view.shared
            and self._has_time(view)
        ]
        moves: list[Move] = []
        moved: set[RequestId] = set()
        touched: frozenset[InstanceId] = frozenset()
        target: InstanceId | None = None
        for view in sorted(movers, key=lambda view: (view.computed, view.id)):
            chosen = self._target(view, others if target is None else frozenset({target}))
            if chosen is None:
                continue
            if chosen not in table.idle:
                if self._clock.idle_in.get(chosen, 0.0) <= self._clock.pace_s:
                    self.meet(view.homes | {chosen})
                continue
            target, touched = chosen, touched | view.homes | {chosen}
            moved.add(view.id)
            self._promised[chosen] += table.grows(view)
            for source, tokens in view.kv:
                if source != chosen:
                    moves.append(Move(view.id, source, chosen, tokens))
                    table.free[chosen] -= table.held_blocks(view, source)
        topology = table.snapshot.topology
        group = topology.smallest_cover(touched, frozenset(table.idle)) if moves else None
        if group is None:
            for move in moves:  # they stay
                view = next(v for v in movers if v.id == move.request)
                table.free[move.target] += table.held_blocks(view, move.source)
            return None
        table.claim(group)
        table.near = [view for view in table.near if view.id not in moved]
        step = MigrateStep(seq=seq, group=group, moves=tuple(moves))
        self._clock.occupy(step)
        return step

    @cached_property
    def _promised(self) -> Counter[InstanceId]:
        """Blocks that those who lie on an instance may still need there; on several they grow
        evenly.
        """
        found = Counter[InstanceId]()
        for view in self._table.census:
            grows = -(-self._table.grows(view) // len(view.kv))
            for share in view.kv:
                found[share[0]] += grows
        return found

    def _has_time(self, view: RequestView) -> bool:
        """Whether the pace of its answer is kept though it moves, or is lost anyway: elsewhere it
        catches up. Of those with much KV most have ended before they have the time; they do not
        move at all.
        """
        late_in = self._clock.late_in(view)
        return late_in < 0.0 or late_in >= self._cost.migrate(view.computed)

    def _target(self, view: RequestView, others: frozenset[InstanceId]) -> InstanceId | None:
        """Where it decodes in time, with room to grow: an idle one, with most who decode there."""
        table = self._table
        size = table.snapshot.block_size
        grows = table.grows(view)
        found: list[tuple[bool, int, int]] = []
        for instance in others:
            moved = sum([table.held_blocks(view, home) for home in view.homes if home != instance])
            if table.free[instance] - self._promised[instance] < moved + grows:
                continue
            there = table.tenants(instance)
            rows, held = there.rows + 1, (there.blocks + moved) * size
            if self._cost.decode(1, DecodeWork(rows, held, 1)) <= self._lanes.decode_s:
                found.append((instance in table.idle, rows, -instance))
        return -max(found)[2] if found else None
