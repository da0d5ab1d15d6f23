"""Prompts in `Elastic`: which ones get on in this plan, where, and by how much.

In the order of their urgency. Short ones go to a single instance, with those who decode there;
those that take long to a lane. Each step lasts as long as those who decode on its instances can
wait, and at most `chunk_s`, for that is how long whoever comes next may have to wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from loongjax.costmodel.protocol import ChunkWork, CostModel
from loongjax.plan import (
    Group,
    InstanceId,
    MigrateStep,
    PrefillStep,
    RequestId,
    RequestView,
)
from loongjax.scheduler.dispatch import Prompt, memory_allows
from loongjax.scheduler.policies.elastic import reasons
from loongjax.scheduler.policies.elastic.clock import Clock
from loongjax.scheduler.policies.elastic.fused import FusedStep
from loongjax.scheduler.policies.elastic.gathering import Gathering
from loongjax.scheduler.policies.elastic.lanes import Lanes
from loongjax.scheduler.policies.elastic.order import Order
from loongjax.scheduler.policies.worktable import Worktable, line_key

_MOST_PROMPTS = 64
"""How many are looked at in one plan."""
_MOST_LONG = 16
"""How many of those that are new may get a lane in one plan."""
_CATCHING_UP = 0.5
"""Part of the time from token to token that a step may take though somebody is late: the rest is
what they catch up by, and prompts get on meanwhile."""
_STARVING = 50.0
"""A prompt that has waited so many times as long as it takes gets on at the cost of decodes."""
_ALONE_PART = 0.8
"""Part of the KV that a decode step of one instance reads in time, up to which a prompt may lie
there alone."""
_ALONE = 2.0
"""A prompt takes so many times as long on one instance beside decodes, at most, as on one of its
own."""


LaneOf: TypeAlias = Mapping[RequestId, frozenset[InstanceId]]


class Prompts:
    """The prompts of one plan, and what is moved for them.

    Attributes:
      steps: What was decided.
      reasons: Why each prompt that was looked at gets on, or waits.
    """

    def __init__(
        self,
        table: Worktable,
        cost: CostModel,
        clock: Clock,
        order: Order,
        *,
        chunk_s: float,
    ) -> None:
        self._table = table
        self._cost = cost
        self._clock = clock
        self._order = order
        self._chunk_s = chunk_s
        in_flight = table.snapshot.in_flight
        waiting = [view for view in table.line if view.id not in in_flight]
        self._line = order.first(waiting, _MOST_PROMPTS)
        self._lanes = Lanes(table, cost, clock.pace_s)
        self._gathering = Gathering(table, cost, clock, self._lanes)
        self._open: dict[InstanceId, FusedStep] = {}
        self._done_s: dict[RequestId, float] = {}
        self._passed_s: dict[Group, float] = {}
        self._far: set[RequestId] = set()
        self._wide = 1
        self.steps: list[PrefillStep | MigrateStep] = []
        self.reasons = {view.id: reasons.ALL_BUSY for view in self._line}

    @property
    def anyone_waits(self) -> bool:
        """Whether a prompt does that this plan does not get on with."""
        return any(view.id not in self._table.placed for view in self._line)

    def seat(self) -> None:
        """Makes the steps."""
        table = self._table
        lane_of = self._choose_lanes()
        self._move(lane_of)
        for view in table.near:
            if len(view.kv) > 1 and not table.idle.issuperset(view.homes):
                self._gathering.meet(view.homes)
        self._wide = self._least_degree(lane_of)
        for lane in lane_of.values():
            self._open_lane(lane)
        full = False
        for view in self._line:
            if view.kv:
                reason = self._go_on(view, lane_of)
            elif full:
                reason = reasons.BEHIND
            elif view.id in self._far:
                reason = reasons.FULL
            elif self._has_memory(view):
                reason = self._begin(view, lane_of)
            else:
                full = True  # whoever comes behind does not take what it waits for
                reason = reasons.MEMORY
            self.reasons[view.id] = reason
        for step in dict.fromkeys(self._open.values()):
            self._finish(step)
        pace_s = self._clock.pace_s
        waits = {i for i, wait in self._gathering.meetings.items() if wait < pace_s / 2}
        table.idle -= waits

    def rescue(self) -> None:
        """Gets on with the first in line by any means: nothing else runs, nor will."""
        table = self._table
        degrees = table.snapshot.topology.degrees
        for view in sorted(self._line, key=line_key):
            for degree in reversed(degrees):
                group = table.cover(view.homes, table.everything, degree)
                if group is None or not table.can_hold_peak(frozenset(group), view):
                    continue
                step = FusedStep(table, self._cost, group, (), math.inf, self._chunk_s)
                if step.add(view, group):
                    table.claim(group)
                    self._finish(step)
                    self.reasons[view.id] = reasons.BY_FORCE
                    return

    def _choose_lanes(self) -> LaneOf:
        """Lanes for those that take long and have memory, and when each would be done there."""
        longs: list[RequestView] = []
        new = 0
        for view in self._line:
            if not self._takes_long(view):
                continue
            if not view.kv and new == _MOST_LONG:
                self._far.add(view.id)
            elif view.kv or self._has_memory(view):
                longs.append(view)
                new += not view.kv
        lane_of = self._lanes.choose(longs)
        busy_s: dict[frozenset[InstanceId], float] = {}
        for view in longs:
            if (lane := lane_of.get(view.id)) is not None:
                own_s = self._order.rest_s(view) * len(self._table.free) / len(lane)
                busy_s[lane] = self._done_s[view.id] = busy_s.get(lane, 0.0) + own_s
        return lane_of

    # ---- who they are ----------------------------------------------------------------

    def _takes_long(self, view: RequestView) -> bool:
        if view.kv and view.homes.isdisjoint(self._lanes.busy):
            return False
        if len(view.kv) > 1:
            return True
        return self._one_s(view) > self._chunk_s or self._lanes.least(view) > 1

    def _one_s(self, view: RequestView) -> float:
        """What a prompt takes on one instance [s]."""
        return self._cost.prefill(1, [ChunkWork(view.length, 0)])

    def _starves(self, view: RequestView) -> bool:
        return self._order.stretch(view) > _STARVING

    def _has_memory(self, view: RequestView) -> bool:
        """The memory test of `dispatch`: it and all who hold KV never need more than there is."""
        table = self._table
        granted = table.granted(view)
        prompt = Prompt(view.length, max(0, granted - view.length), table.blocks(granted))
        if prompt.blocks > sum(table.free):
            return False
        plenty = table.has_plenty(prompt.blocks)
        return plenty or memory_allows([prompt], table.pool(table.everything)) == 1

    # ---- steps -----------------------------------------------------------------------

    def _move(self, lane_of: LaneOf) -> None:
        lanes = self._lanes.busy.union(*lane_of.values())
        if not lanes:
            return
        step = self._gathering.move(lanes - self._lanes.left, self._table.snapshot.next_seq)
        if step is not None:
            self.steps.append(step)

    def _least_degree(self, lane_of: LaneOf) -> int:
        """How wide steps of prompts are at least. While there are only prompts of one lane they get
        all instances that they can use, though their KV stays where it is: whoever comes waits for
        a step, and then decodes on instances of its own.
        """
        snapshot = self._table.snapshot
        lanes = {lane_of.get(view.id, view.homes) for view in self._line}
        if snapshot.running or len(snapshot.waiting) > len(self._line) or len(lanes) != 1:
            return 1
        return max([self._lanes.need(view).usable for view in self._line])

    def _open_lane(self, lane: frozenset[InstanceId]) -> None:
        """Begins a step on a lane, or lets those of it that are idle wait for the others."""
        if any(instance in self._open for instance in lane):
            return
        if self._table.idle.issuperset(lane):
            self._open_step(lane, self._wide)
        else:
            self._gathering.meet(lane)

    def _open_step(self, members: frozenset[InstanceId], degree: int = 1) -> FusedStep | None:
        """Begins a step on idle instances, these and more if so many can be had."""
        table, due_on = self._table, self._clock.due_on
        idle = frozenset(table.idle)
        found = table.cover(members, idle, degree) or table.cover(members, idle)
        if found is None:
            return None
        members = frozenset(found)
        if self._is_due_across(members):
            return None
        riders = [
            view
            for view in table.near
            if view.kv[0][0] in members and (len(view.kv) == 1 or members.issuperset(view.homes))
        ]
        if len(riders) > table.snapshot.max_rows * len(found):
            return None
        due = min([due_on.get(i, math.inf) for i in found])
        meeting = min([self._gathering.meetings.get(i, math.inf) for i in found])
        budget = min(max(due, _CATCHING_UP * self._clock.pace_s), meeting)
        meets = meeting < math.inf
        step = FusedStep(table, self._cost, found, riders, budget, self._chunk_s, meets=meets)
        self._open.update(dict.fromkeys(found, step))
        table.claim(found)
        return step

    def _is_due_across(self, members: frozenset[InstanceId]) -> bool:
        """Whether somebody who decodes on some of these and on others, too, is due: it cannot ride
        along, and goes first.
        """
        soon = self._clock.pace_s / 2
        return any(
            len(view.kv) > 1
            and not view.homes <= members
            and not view.homes.isdisjoint(members)
            and self._table.idle.issuperset(view.homes)
            and self._clock.due_in(view) < soon
            for view in self._table.near
        )

    def _finish(self, step: FusedStep) -> None:
        made = step.finish(self._table.snapshot.next_seq + len(self.steps))
        if made is None:
            self._table.idle.update(step.group)
            return
        self.steps.append(made)
        riders = {view.id for view in step.riders}
        self._table.near = [view for view in self._table.near if view.id not in riders]

    # ---- prompts ---------------------------------------------------------------------

    def _go_on(self, view: RequestView, lane_of: LaneOf) -> str:
        """The next chunk of a prompt that is begun; says why there is one or not."""
        step = self._open.get(next(iter(view.homes)))
        if step is None and self._table.idle.issuperset(view.homes):
            step = self._open_step(view.homes, self._wide)
        if step is None or not step.members >= view.homes:
            return reasons.BUSY
        homes = lane_of.get(view.id, view.homes) & step.members
        if step.add(view, homes, forced=self._starves(view)):
            return reasons.GOES_ON
        rest_s = self._order.rest_s(view)
        self._passed_s[step.group] = min(rest_s, self._passed_s.get(step.group, math.inf))
        return reasons.DUE

    def _begin(self, view: RequestView, lane_of: LaneOf) -> str:
        """The first chunk of a new prompt; says why there is one or not."""
        lane = lane_of.get(view.id)
        if lane is None:
            return self._begin_on_one(view)
        if self._begin_on_lane(view, lane):
            return reasons.ON_LANE + self._lanes.why[view.id]
        if self._begin_alone(view):
            return reasons.ALONE_BESIDE
        return reasons.FULL if self._open.get(min(lane)) else reasons.BUSY

    def _begin_on_lane(self, view: RequestView, lane: frozenset[InstanceId]) -> bool:
        """Begins a prompt that takes long, if there is time and memory for it, and nobody who is
        begun and takes less was passed over for lack of time: a first part is always worth it, and
        too many would be begun.
        """
        step = self._open.get(min(lane))
        needed = self._lanes.need(view).blocks
        if step is None or not step.members >= lane or self._lanes.room_on(lane) < needed:
            return False
        if self._order.rest_s(view) >= self._passed_s.get(step.group, math.inf):
            return False
        return step.add(view, lane, forced=self._starves(view)) > 0

    def _begin_alone(self, view: RequestView) -> bool:
        """Begins a prompt that takes long on one instance beside the lanes, one at a time, if it is
        not done so late there that it would become urgent, or later still on its lane.
        """
        table = self._table
        others = table.idle - self._lanes.busy
        if not self._lanes.in_use or not others or view.length > _ALONE_PART * self._lanes.in_time:
            return False
        if any(len(begun.kv) == 1 and begun.uncomputed > 1 for begun in table.begun):
            return False
        waited, alone_s = self._clock.now - view.arrival, _ALONE * self._one_s(view)
        late = waited + alone_s > _STARVING * self._order.rest_s(view)
        if late and alone_s > self._done_s[view.id]:
            return False
        return self._begin_on(view, others, spare=2)

    def _begin_on_one(self, view: RequestView) -> str:
        """Begins a short prompt: beside the lanes if it can, else along with others there."""
        if idle := self._table.idle:
            beside = idle - self._lanes.busy
            if self._begin_on(view, beside) or self._begin_on(view, idle - beside):
                return reasons.ON_ONE
        steps = [step for step in dict.fromkeys(self._open.values()) if not step.refuses(view)]
        if len(steps) > 1:
            steps.sort(key=lambda step: (len(step.group), -step.left_s, step.group))
        return reasons.JOINS if any(self._join(view, step) for step in steps) else reasons.NOWHERE

    def _begin_on(self, view: RequestView, idle: Iterable[InstanceId], spare: int = 1) -> bool:
        """Begins a prompt on one of these, with the fewest who decode."""
        table = self._table
        needed = spare * (table.blocks(view.length) + 1)
        meetings, pace_s = self._gathering.meetings, self._clock.pace_s
        fitting = [
            i for i in idle if table.free[i] >= needed and meetings.get(i, math.inf) > pace_s
        ]
        if not fitting:
            return False
        home = min(fitting, key=lambda i: (table.tenants(i).rows, -table.free[i], i))
        step = self._open_step(frozenset({home}))
        return step is not None and self._join(view, step)

    def _join(self, view: RequestView, step: FusedStep) -> bool:
        """Adds a new prompt to a step, its KV on one instance."""
        free = self._table.free
        home = max(step.group, key=lambda i: (free[i], -i))
        if free[home] < self._table.blocks(view.length):
            return False
        forced = step.may_be_forced and self._starves(view)
        return step.add(view, [home], forced=forced) > 0
