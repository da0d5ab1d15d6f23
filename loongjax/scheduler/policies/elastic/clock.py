"""Time in one plan of `Elastic`: when tokens are due, and when instances will be idle."""

from __future__ import annotations

import math
from functools import cached_property

from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.costmodel.steps import moves_seconds
from loongjax.plan import (
    Group,
    InstanceId,
    MigrateStep,
    PrefillStep,
    RequestView,
    Step,
)
from loongjax.scheduler.policies.worktable import Worktable

_LOST = 16
"""Who is late by so many tokens will hardly be in time again: it keeps the pace from now on, and
others do not wait until it has caught up."""
_RESERVE = 0.4
_RESERVE_TOKENS = 8
"""Each of the first tokens of an answer is due so much of the time from token to token earlier:
short answers are not late because of one slow step, and a request has time to move."""
_SLOWEST = 1.5
"""On slow hardware the time from token to token is at least so many times that of a step of those
who decode, and that of the smallest step of a prompt: prompts would not get on else."""


class Clock:
    """See the module.

    Attributes:
      now: The engine's clock [s].
      pace_s: The time from token to token that everyone who decodes is to have [s]: what is asked
        for, or more where steps take too long for that.
    """

    def __init__(self, table: Worktable, cost: CostModel, now: float, pace_s: float) -> None:
        rows = -(-len(table.snapshot.running) // len(table.free)) or 1
        self.now = now
        decode_s = _SLOWEST * cost.decode(1, DecodeWork(rows, rows, 1))
        self.pace_s = max(pace_s, decode_s, cost.prefill(1, [ChunkWork(1, 1)]))
        self._table = table
        self._cost = cost

    def due_in(self, view: RequestView) -> float:
        """When a request that decodes should have its next token [s from now].

        Each is due `pace_s` after the one before, counted from the first, and the first ones
        sooner. So the mean time from token to token is kept wherever the answer ends, and who is
        ahead can wait for a chunk.
        """
        early = _RESERVE * min(max(1, view.generated), _RESERVE_TOKENS)
        due = self.late_in(view) - self.pace_s * early
        return due if due > -_LOST * self.pace_s else self.pace_s

    def late_in(self, view: RequestView) -> float:
        """When the pace of its answer so far is lost without another token [s from now]."""
        first = self.now if view.first_token is None else view.first_token
        return first + self.pace_s * max(1, view.generated) - self.now

    @cached_property
    def due_on(self) -> dict[InstanceId, float]:
        """When the first of those who decode on idle instances is due there [s from now]."""
        found: dict[InstanceId, float] = {}
        for view in self._table.near:
            due = self.due_in(view)
            for share in view.kv:
                if due < found.get(share[0], math.inf):
                    found[share[0]] = due
        return found

    @cached_property
    def idle_in(self) -> dict[InstanceId, float]:
        """When busy instances will be idle, about [s from now]."""
        found: dict[InstanceId, float] = {}
        for step, launched in self._table.snapshot.flights:
            begins = max(launched - self.now, *(found.get(i, -math.inf) for i in step.group))
            ends = max(0.0, begins + self._seconds(step))
            found.update(dict.fromkeys(step.group, ends))
        return found

    def occupy(self, step: MigrateStep) -> None:
        """Takes note of a step of this plan, for those who wait for its instances."""
        self.idle_in.update(dict.fromkeys(step.group, self._seconds(step)))

    def _seconds(self, step: Step) -> float:
        """How long a step in flight takes in all; KV is taken to lie evenly."""
        degree = len(step.group)
        if isinstance(step, PrefillStep):
            return self._cost.prefill(degree, [ChunkWork(c.length, c.start) for c in step.chunks])
        if isinstance(step, MigrateStep):
            return moves_seconds(step.moves, self._cost)
        rows = len(step.rows)
        return self._cost.decode(degree, DecodeWork(rows, self._held(step.group), degree))

    def _held(self, group: Group) -> int:
        """KV tokens on a group."""
        table = self._table
        blocks = sum([table.capacity[i] - table.free[i] for i in group])
        return blocks * table.snapshot.block_size
