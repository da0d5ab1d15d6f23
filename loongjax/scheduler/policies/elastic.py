"""Prototype."""

from __future__ import annotations

from dataclasses import dataclass

from loongjax.costmodel.protocol import ChunkWork, CostModel
from loongjax.plan import DecodeStep, Plan, RequestView, Snapshot
from loongjax.scheduler.policies.continuing import groups_to_go_on
from loongjax.scheduler.policies.loongserve import _preempt_last
from loongjax.scheduler.policies.mixing import Mixer
from loongjax.scheduler.policies.seating import Seating
from loongjax.scheduler.policies.worktable import Worktable


@dataclass(frozen=True, kw_only=True, slots=True)
class Elastic:
    """Prototype."""

    cost: CostModel
    headroom: int | None = 512
    decode_s: float = 0.045
    chunk_s: float = 0.3
    slack_factor: float = 25.0
    slack_floor_s: float = 1.0
    waste: float = 4.0
    share: float = 0.6

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        table = Worktable(snapshot, self.headroom)
        seating = Seating(table, grows=True)
        decodes: list[DecodeStep] = []
        mixer = Mixer(table, self, now)
        if table.idle:
            seating.seat_the_short()
            mixer.seat()
            seating.seat_the_rest()
            seating.grow_for_compute(self.cost)
            decodes = seating.steps(snapshot.next_seq + len(mixer.steps), self.cost)
        steps = (*mixer.steps, *decodes)
        if not steps and not table.soon and not table.late:
            _preempt_last(table)
        ahead = frozenset()
        if not mixer.anyone_waits():
            ahead = groups_to_go_on(table, decodes, grows=True, cost=self.cost)
        return Plan(steps=steps, preempt=tuple(table.preempted), ahead=ahead)
