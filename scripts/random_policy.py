"""A policy that decides by chance: any group, home, master, chunk and move that the rules allow.

For soaks. It knows no good and bad, so what it does in minutes covers what a policy with aims
would do in months: scale-ups and scale-downs, changes of group, moves, preemption, and groups
that go on or do not. When chance leaves everything idle, `FirstCome` decides, which gets on from
wherever it is.
"""

from __future__ import annotations

import random
from collections import Counter

from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Group,
    InstanceId,
    MigrateStep,
    Move,
    Placement,
    Plan,
    PrefillStep,
    RequestView,
    Share,
    Snapshot,
    Step,
)
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.scheduler.validate import blocks_for

MAX_CHUNK = 48
MAX_ROWS = 4  # for each rank: few programs, none of them large


class RandomPolicy:
    """See the module. The same seed and snapshot give the same plan."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._fallback = FirstCome(tokens_per_rank=MAX_CHUNK, headroom=0)

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `loongjax.scheduler.policy.Policy`."""
        plan = _Draw(snapshot, random.Random(f"{self._seed}-{snapshot.version}")).plan()
        if not plan.steps and all(view.busy_seq is None for view in snapshot.instances):
            return self._fallback.schedule(now, snapshot)
        return plan


class _Draw:
    """One plan, step by step, with what is left of instances, blocks and requests."""

    def __init__(self, snapshot: Snapshot, chance: random.Random) -> None:
        self._snapshot = snapshot
        self._chance = chance
        self._idle = {view.id for view in snapshot.instances if view.busy_seq is None}
        size = snapshot.block_size
        self._free = {view.id: view.free_slots // size for view in snapshot.instances}
        views = (*snapshot.waiting, *snapshot.running)
        self._ready = [view for view in views if view.id not in snapshot.in_flight]
        self._steps: list[Step] = []

    def plan(self) -> Plan:
        """A few steps on disjoint groups; rarely a preemption instead."""
        chance = self._chance
        holders = [view for view in self._ready if view.kv]
        if holders and chance.random() < 0.01:
            return Plan(preempt=(chance.choice(holders).id,))
        chance.shuffle(self._ready)
        for view in list(self._ready):
            if view not in self._ready or not view.homes <= self._idle:
                continue
            if len(view.kv) and chance.random() < 0.1:
                self._migrate(view)
            elif view.uncomputed > 1 or not view.kv:
                self._prefill(view)
            else:
                self._decode(view)
        return Plan(steps=tuple(self._steps), ahead=self._groups_to_go_on())

    def _group(self, homes: frozenset[InstanceId]) -> Group | None:
        """Any group of idle instances with these."""
        topology = self._snapshot.topology
        found = [
            group
            for degree in topology.degrees
            for group in topology.groups(degree)
            if homes.issubset(group) and self._idle.issuperset(group)
        ]
        return self._chance.choice(found) if found else None

    def _launch(self, step: Step, *views: RequestView) -> None:
        self._steps.append(step)
        self._idle.difference_update(step.group)
        self._ready = [view for view in self._ready if view not in views]

    @property
    def _seq(self) -> int:
        return self._snapshot.next_seq + len(self._steps)

    def _prefill(self, view: RequestView) -> None:
        """A chunk of any length, kept in any parts on any of its group's instances."""
        group, chance = self._group(view.homes), self._chance
        if group is None or not self._may_begin(view):
            return
        length = chance.randint(1, min(view.uncomputed, MAX_CHUNK))
        if chance.random() < 0.5:
            length = min(view.uncomputed, MAX_CHUNK)
        homes = chance.sample(group, chance.randint(1, len(group)))
        cuts = sorted(chance.randint(0, length) for _ in homes[1:])
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        shares = tuple(Share(i, n) for i, n in zip(homes, sizes, strict=True) if n)
        wanted = {i: blocks_for(n, self._snapshot.block_size) for i, n in shares}
        if any(blocks > self._free[i] for i, blocks in wanted.items()):
            return
        end = view.computed + length
        chunk = Chunk(request=view.id, start=view.computed, length=length, last=end == view.length)
        keep = Placement(request=view.id, shares=shares)
        step = PrefillStep(seq=self._seq, group=group, chunks=(chunk,), keep=(keep,))
        self._launch(step, view)

    def _may_begin(self, view: RequestView) -> bool:
        """New ones wait while the pool could not hold what is begun, and them, to the end."""
        snapshot = self._snapshot
        begun = [other for other in (*snapshot.waiting, *snapshot.running) if other.kv]
        peaks = sum(other.peak for other in (*begun, view))
        return bool(view.kv) or peaks < 0.7 * sum(i.slots for i in snapshot.instances)

    def _decode(self, view: RequestView) -> None:
        """Some of those that fit a group, with any masters and homes."""
        group, chance = self._group(view.homes), self._chance
        if group is None:
            return
        masters: Counter[InstanceId] = Counter()
        taken: Counter[InstanceId] = Counter()
        rows, views = [], []
        for other in [view, *self._ready]:
            if other in views or not other.kv or other.uncomputed > 1:
                continue
            if not other.homes.issubset(group) or (views and chance.random() < 0.2):
                continue
            master, home = chance.choice(group), chance.choice(group)
            if other.tail is not None and chance.random() < 0.8:
                home = other.tail.instance
            if masters[master] == MAX_ROWS or taken[home] == self._free[home]:
                continue
            masters[master] += 1
            taken[home] += 1  # a block at most
            rows.append(DecodeRow(other.id, master, home))
            views.append(other)
        if rows:
            self._launch(DecodeStep(seq=self._seq, group=group, rows=tuple(rows)), *views)

    def _migrate(self, view: RequestView) -> None:
        """Some of a share, to anywhere."""
        chance = self._chance
        source, held = chance.choice(view.kv)
        others = sorted(self._idle - {source})
        if not others:
            return
        target, tokens = chance.choice(others), chance.randint(1, held)
        group = self._group(frozenset((source, target)))
        if group is not None and tokens <= self._free[target]:
            move = Move(view.id, source, target, tokens)
            self._launch(MigrateStep(seq=self._seq, group=group, moves=(move,)), view)

    def _groups_to_go_on(self) -> frozenset[Group]:
        """Most groups of this plan, and most that are busy."""
        groups: dict[int, list[InstanceId]] = {}
        for view in self._snapshot.instances:
            if view.busy_seq is not None:
                groups.setdefault(view.busy_seq, []).append(view.id)
        found = [tuple(group) for group in groups.values()]
        found += [step.group for step in self._steps if isinstance(step, DecodeStep)]
        return frozenset(group for group in found if self._chance.random() < 0.7)
