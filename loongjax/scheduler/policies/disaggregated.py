"""Prefill and decode apart (DistServe, OSDI '24), as a baseline: two kinds of lanes.

Some lanes compute prompts only, the others decode only. A finished prompt's KV moves from one
to the other by a `MigrateStep`, on which both lanes work for as long as it takes; moves go
before new prompts and new decode steps. While the decode lanes have no memory for it, it stays
where it is. Lanes have the lowest degree that there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loongjax.costmodel.protocol import CostModel
from loongjax.errors import ConfigError
from loongjax.plan import (
    Group,
    InstanceId,
    MigrateStep,
    Move,
    Plan,
    RequestId,
    RequestView,
    Share,
    Snapshot,
    Step,
)
from loongjax.scheduler.dispatch import Prompt, memory_allows, tipping_point
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
class Disaggregated:
    """Lanes for prompts, and lanes for decodes. See the module.

    Attributes:
      cost: Predicts how long steps take.
      prefill_lanes: How many compute prompts; None: half of them.
      headroom: Tokens beyond the known ones that memory is kept for when a request comes to a
        lane; None: all that each may generate.
    """

    cost: CostModel
    prefill_lanes: int | None = None
    headroom: int | None = 512

    def __post_init__(self) -> None:
        if self.prefill_lanes is not None and self.prefill_lanes < 1:
            raise ConfigError(f"prefill_lanes must be at least 1, not {self.prefill_lanes}")
        if self.headroom is not None and self.headroom < 0:
            raise ConfigError(f"headroom must not be negative, got {self.headroom}")

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`. Does not look at the clock.

        Raises:
          ConfigError: There are not enough groups for both kinds of lanes.
        """
        table = Worktable(snapshot, self.headroom)
        groups = lanes(snapshot.topology, snapshot.topology.degrees[0])
        count = len(groups) // 2 if self.prefill_lanes is None else self.prefill_lanes
        if not 1 <= count < len(groups):
            raise ConfigError(
                f"{count} of {len(groups)} groups would compute prompts; prefill and decode apart "
                "need one each. Add instances, or lower prefill_lanes"
            )
        preempt_strangers(table, groups)
        reject = reject_too_long(table, groups)
        steps = _Plan(self, table, groups[:count], groups[count:]).steps(
            {rejection.request for rejection in reject}
        )
        return Plan(
            steps=tuple(steps),
            preempt=tuple(table.preempted),
            reject=reject,
            ahead=lanes_to_go_on(table, groups[count:], steps),
        )


class _Plan:
    """The steps of one plan."""

    def __init__(
        self,
        policy: Disaggregated,
        table: Worktable,
        prefilling: Sequence[Group],
        decoding: Sequence[Group],
    ) -> None:
        self._cost = policy.cost
        self._table = table
        self._prefilling = prefilling
        self._decoding = decoding
        self._steps: list[Step] = []

    def steps(self, rejected: set[RequestId]) -> list[Step]:
        """Moves, then decodes and prompts on what is left."""
        for source in self._prefilling:
            self._hand_over(source)
        for group in self._decoding:
            lane = Lane(self._table, group, self._cost)
            if lane.idle and (rows := lane.decode(lane.rows_left)):
                self._steps.append(lane.decode_step(self._next_seq, rows))
        out = self._table.snapshot.in_flight | rejected
        line = [view for view in self._table.line if view.id not in out]
        tip = tipping_point(1, self._cost)
        for group in self._prefilling:
            lane = Lane(self._table, group, self._cost)
            if lane.idle and lane.begin(line, Budget(tokens=tip * len(group), splits=False)):
                self._steps.append(lane.prefill_step(self._next_seq))
                line = [view for view in line if view.id not in self._table.placed]
        return self._steps

    @property
    def _next_seq(self) -> int:
        return self._table.snapshot.next_seq + len(self._steps)

    def _hand_over(self, source: Group) -> None:
        """Moves finished prompts from a lane to the roomiest other one, in line, as one step."""
        table = self._table
        lane = Lane(table, source, self._cost)
        finished = [view for view in lane.holders() if view.uncomputed == 1]
        target: Group | None = None
        moves: list[Move] = []
        for view in finished:
            if target is None:
                target = max(self._decoding, key=self._free)
            found = self._moves(view, target)
            if not found:
                break
            if not self._can_run(source, target):
                return
            moves += found
            self._place(view, found)
        if moves and target is not None:
            group = self._cover(source, target)
            self._steps.append(MigrateStep(seq=self._next_seq, group=group, moves=tuple(moves)))
            table.claim(group)

    def _moves(self, view: RequestView, target: Group) -> list[Move]:
        """Each share to the roomiest instance; empty if there is no memory for the request."""
        table = self._table
        granted = table.granted(view)
        wanted = Prompt(view.computed, max(0, granted - view.computed), table.blocks(granted))
        if not memory_allows([wanted], table.pool(frozenset(target))):
            return []
        free = {instance: table.free[instance] for instance in target}
        moves = []
        for share in view.kv:
            home = max(free, key=lambda instance: (free[instance], -instance))
            free[home] -= table.held_blocks(view, share.instance)
            if free[home] < 0:
                return []
            moves.append(Move(view.id, share.instance, home, share.tokens))
        return moves

    def _place(self, view: RequestView, moves: Sequence[Move]) -> None:
        kv: dict[InstanceId, int] = {}
        for move in moves:
            kv[move.target] = kv.get(move.target, 0) + move.tokens
        after = tuple(Share(instance, kv[instance]) for instance in sorted(kv))
        taken = [(m.target, self._table.held_blocks(view, m.source)) for m in moves]
        self._table.place(replace(view, kv=after, tail=None, holes=()), taken)

    def _can_run(self, source: Group, target: Group) -> bool:
        """Whether all that a move needs is idle; else keeps what is, unless prompts are
        computed on the rest.
        """
        table, group = self._table, frozenset(self._cover(source, target))
        if table.idle >= group:
            return True
        if table.late.isdisjoint(group):
            table.claim(group)
        return False

    def _cover(self, source: Group, target: Group) -> Group:
        """The smallest group of both lanes. There always is one: any KV can be handed over."""
        found = self._table.snapshot.topology.smallest_cover(frozenset((*source, *target)))
        if found is None:
            raise ConfigError(
                f"no group holds both {source} and {target}, so that KV cannot be handed over; "
                "allow larger degrees"
            )
        return found

    def _free(self, group: Group) -> int:
        return sum(self._table.free[instance] for instance in group)
