"""Engines without elasticity, as baselines: groups that never change.

The cluster is cut into lanes of equal degree: one of all instances, or one for each instance.
A new prompt goes to the idle lane with the least KV, in line: no lane is idle while another
has prompts to begin. What a lane does:

- Without `chunk`: whole prompts first, as many as keep it busy (the tipping point of
  `dispatch`); but between two prompts, everybody who decodes gets a token.
- With `chunk`: every step carries all who decode, and fills up with parts of prompts to so
  many tokens (SplitFuse; Sarathi, OSDI '24).

So `tp` is one instance of many devices, `static_sp` one group of all instances, `replicated` a
group for each instance, and `chunked_prefill` like `tp` with chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loongjax.costmodel.protocol import ChunkWork, CostModel
from loongjax.errors import ConfigError
from loongjax.plan import Plan, RequestId, RequestView, Snapshot, Step
from loongjax.scheduler.dispatch import tipping_point
from loongjax.scheduler.policies.lane import (
    Budget,
    Lane,
    lanes,
    lanes_to_go_on,
    preempt_strangers,
    reject_too_long,
)
from loongjax.scheduler.policies.worktable import Worktable


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedGroups:
    """Groups of one degree that never change. See the module.

    Attributes:
      cost: Predicts how long steps take.
      degree: Lanes of the largest, or of the smallest degree that there is.
      chunk: Tokens of a step that computes prompts, decodes included; None: whole prompts.
        Higher: more throughput, longer pauses from token to token.
      order: `arrival`: first come, first served. `slack`: least slack first, where a prompt is
        due `slack_floor_s`, or `slack_factor` times its prefill alone if that is more, after
        it came: short prompts do not wait behind long ones that have time.
      slack_factor, slack_floor_s: See `order`.
      headroom: Tokens beyond the known ones that memory is kept for when a prompt is
        admitted; None: all that each may generate.
    """

    cost: CostModel
    degree: Literal["largest", "smallest"] = "largest"
    chunk: int | None = None
    order: Literal["arrival", "slack"] = "arrival"
    slack_factor: float = 25.0
    slack_floor_s: float = 15.0
    headroom: int | None = 512

    def __post_init__(self) -> None:
        if self.degree not in ("largest", "smallest") or self.order not in ("arrival", "slack"):
            raise ConfigError(
                f"degree must be largest or smallest, and order arrival or slack; they are "
                f"{self.degree!r} and {self.order!r}"
            )
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(f"chunk must be at least 1 token, not {self.chunk}")
        if self.headroom is not None and self.headroom < 0:
            raise ConfigError(f"headroom must not be negative, got {self.headroom}")

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`. Does not look at the clock."""
        table = Worktable(snapshot, self.headroom)
        degrees = snapshot.topology.degrees
        groups = lanes(snapshot.topology, degrees[-1 if self.degree == "largest" else 0])
        preempt_strangers(table, groups)
        reject = reject_too_long(table, groups)
        line = self._line(table, {rejection.request for rejection in reject}, len(groups[0]))
        idle = [lane for group in groups if (lane := Lane(table, group, self.cost)).idle]
        steps: list[Step] = []
        for lane in sorted(idle, key=lambda lane: lane.capacity - lane.free):
            step = self._step(lane, line, snapshot.next_seq + len(steps))
            if step is not None:
                steps.append(step)
            line = [view for view in line if view.id not in table.placed]
        return Plan(
            steps=tuple(steps),
            preempt=tuple(table.preempted),
            reject=reject,
            ahead=frozenset() if line else lanes_to_go_on(table, groups, steps),
        )

    def _line(
        self, table: Worktable, rejected: set[RequestId], degree: int
    ) -> Sequence[RequestView]:
        """Who waits and is in no step, in the order in which they are wanted."""
        out = table.snapshot.in_flight | rejected
        line = [view for view in table.line if view.id not in out]
        if self.order == "arrival":
            return line
        return sorted(line, key=lambda view: (-view.priority, self._latest(view, degree)))

    def _latest(self, view: RequestView, degree: int) -> float:
        """When the rest of a prompt has to begin to be in time [s]."""
        alone = self.cost.prefill(degree, [ChunkWork(view.length, 0)])
        rest = self.cost.prefill(degree, [ChunkWork(max(1, view.uncomputed), view.computed)])
        return view.arrival + max(self.slack_factor * alone, self.slack_floor_s) - rest

    def _step(self, lane: Lane, line: Sequence[RequestView], seq: int) -> Step | None:
        if self.chunk is not None:
            return _fused_step(lane, line, self.chunk, seq)
        tip = tipping_point(1, self.cost) * len(lane.group)
        if not lane.owes_tokens() and lane.begin(line, Budget(tokens=tip, splits=False)):
            return lane.prefill_step(seq)
        rows = lane.decode(lane.rows_left)
        return lane.decode_step(seq, rows) if rows else None


def _fused_step(lane: Lane, line: Sequence[RequestView], chunk: int, seq: int) -> Step | None:
    """All who decode and parts of prompts; a decode step if there are no prompts."""
    rows = lane.decode(min(chunk, lane.rows_left))
    lane.carry(rows)
    if lane.begin(line, Budget(tokens=chunk, splits=True)):
        return lane.prefill_step(seq)
    return lane.decode_step(seq, rows) if rows else None
