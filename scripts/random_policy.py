"""A policy that plans anything that the rules allow: the worst scheduler that may exist.

It proposes random steps and keeps those that `validate` lets pass. So whatever the rules
allow is to be right on the devices, however silly it is. It knows no good and bad, so what it
does in minutes covers what a policy with aims would do in months.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from loongjax.errors import PlanError
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
from loongjax.scheduler import validate
from loongjax.scheduler.policies.first_come import FirstCome

T = TypeVar("T")


@dataclass(kw_only=True)
class RandomPolicy:
    """Plans at random; where chance finds nothing to run, and after `patience` plans, it asks
    `FirstCome`, so that everybody ends.

    Attributes:
      seed: The same seed gives the same plans for the same snapshots.
      preempts: How probable it is that a plan preempts somebody.
      patience: Plans that are made at random; None: all.
    """

    seed: int
    preempts: float = 0.03
    patience: int | None = None
    _plans: int = field(default=0, init=False)
    _sane: FirstCome = field(default_factory=FirstCome)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`."""
        self._plans += 1
        if self.patience is not None and self._plans > self.patience:
            return self._sanely(now, snapshot)
        plan = Plan()
        if self._chance.random() < self.preempts:
            plan = self._with_preemption(plan, snapshot)
        for _ in range(self._chance.randint(1, 8)):
            plan = self._with_step(plan, snapshot)
        idle = all(view.busy_seq is None for view in snapshot.instances)
        if idle and not plan.steps and not plan.preempt:
            return self._sanely(now, snapshot)
        return replace(plan, ahead=self._groups_to_go_on(plan, snapshot))

    def _sanely(self, now: float, snapshot: Snapshot) -> Plan:
        """As `FirstCome` does it. But it does not know what to do with one who has wasted all
        memory on partly filled blocks, as it would not.
        """
        plan = self._sane.schedule(now, snapshot)
        idle = all(view.busy_seq is None for view in snapshot.instances)
        if idle and not plan.steps and not plan.preempt:
            return Plan(preempt=tuple(view.id for view in _open(snapshot) if view.kv))
        return plan

    def _groups_to_go_on(self, plan: Plan, snapshot: Snapshot) -> frozenset[Group]:
        """Half of the groups that work."""
        busy: dict[int, list[InstanceId]] = {}
        for view in snapshot.instances:
            if view.busy_seq is not None:
                busy.setdefault(view.busy_seq, []).append(view.id)
        groups = [*map(tuple, busy.values()), *(step.group for step in plan.steps)]
        return frozenset(group for group in groups if self._chance.random() < 0.5)

    def _with_preemption(self, plan: Plan, snapshot: Snapshot) -> Plan:
        holders = [v.id for v in _open(snapshot) if v.kv and v.id not in snapshot.in_flight]
        return replace(plan, preempt=tuple(self._some(holders, 1)))

    def _with_step(self, plan: Plan, snapshot: Snapshot) -> Plan:
        """The plan and one step more, if the one that chance proposes is allowed."""
        propose = self._chance.choice((self._prefill, self._prefill, self._decode, self._migrate))
        step = propose(snapshot, snapshot.next_seq + len(plan.steps), plan)
        if step is None:
            return plan
        more = replace(plan, steps=(*plan.steps, step))
        try:
            validate(snapshot, more)
        except PlanError:
            return plan
        return more

    def _prefill(self, snapshot: Snapshot, seq: int, plan: Plan) -> Step | None:
        views = self._company(snapshot.waiting, snapshot)
        group = self._group(snapshot, plan, views)
        if group is None:
            return None
        chunks, keep = [], []
        for view in views:
            length = view.uncomputed
            if self._chance.random() < 0.5:
                length = self._chance.randint(1, length)
            last = length == view.uncomputed
            chunks.append(Chunk(request=view.id, start=view.computed, length=length, last=last))
            keep.append(Placement(request=view.id, shares=self._shares(group, length)))
        return PrefillStep(seq=seq, group=group, chunks=tuple(chunks), keep=tuple(keep))

    def _decode(self, snapshot: Snapshot, seq: int, plan: Plan) -> Step | None:
        views = self._company(snapshot.running, snapshot)
        group = self._group(snapshot, plan, views)
        if group is None:
            return None
        choose = self._chance.choice
        rows = tuple(DecodeRow(view.id, choose(group), choose(group)) for view in views)
        return DecodeStep(seq=seq, group=group, rows=rows)

    def _migrate(self, snapshot: Snapshot, seq: int, plan: Plan) -> Step | None:
        moves = []
        for view in self._company([v for v in _open(snapshot) if v.kv], snapshot):
            source, tokens = self._chance.choice(view.kv)
            target = self._chance.choice([v.id for v in snapshot.instances])
            if source != target:
                some = self._chance.choice((tokens, self._chance.randint(1, tokens)))
                moves.append(Move(view.id, source, target, some))
        touched = {i for move in moves for i in (move.source, move.target)}
        group = self._around(snapshot, plan, touched)
        return MigrateStep(seq=seq, group=group, moves=tuple(moves)) if moves and group else None

    def _company(self, views: Sequence[RequestView], snapshot: Snapshot) -> list[RequestView]:
        return self._some([v for v in views if v.id not in snapshot.in_flight], 3)

    def _group(self, snapshot: Snapshot, plan: Plan, views: list[RequestView]) -> Group | None:
        homes = set[InstanceId]().union(*(view.homes for view in views))
        return self._around(snapshot, plan, homes) if views else None

    def _around(self, snapshot: Snapshot, plan: Plan, needed: set[InstanceId]) -> Group | None:
        """Any group of idle instances that holds `needed`."""
        used = {instance for step in plan.steps for instance in step.group}
        idle = {view.id for view in snapshot.instances if view.busy_seq is None} - used
        if not needed <= idle:
            return None
        more = self._some(sorted(idle - needed), len(idle))
        if self._chance.random() < 0.5:
            more = []
        return tuple(sorted(needed.union(more))) or tuple(self._some(sorted(idle), 1)) or None

    def _shares(self, group: Group, tokens: int) -> tuple[Share, ...]:
        """Any part of the group, in any proportion and order."""
        order = self._some(list(group), len(group))
        cuts = sorted(self._chance.randint(0, tokens) for _ in order[1:])
        edges = [0, *cuts, tokens]
        pairs = zip(order, edges, edges[1:], strict=False)
        return tuple(Share(i, b - a) for i, a, b in pairs if b > a)

    def _some(self, things: list[T], most: int) -> list[T]:
        """One to `most` of them, in any order; none of none."""
        if not things:
            return []
        return self._chance.sample(things, self._chance.randint(1, min(most, len(things))))


def _open(snapshot: Snapshot) -> list[RequestView]:
    return [*snapshot.running, *snapshot.waiting]
