"""Making room for prompts: whose KV moves where, so that nobody decodes on some instances.

A request moves in one piece, the largest first, to where most is free, and only where it
could end and where those who decode there keep room for what they are expected to add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import chain

from loongjax.plan import Group, InstanceId, Move, RequestView
from loongjax.scheduler.policies.worktable import Worktable


@dataclass(frozen=True, kw_only=True, slots=True)
class Clearing:
    """How some instances are cleared.

    Attributes:
      moves: As in a `MigrateStep`.
      group: Where they run: sources, targets, and what rounds them up to a group.
    """

    moves: tuple[Move, ...]
    group: Group


def clear(
    table: Worktable, sources: Set[InstanceId], closed: Set[InstanceId], answer: int
) -> Clearing | None:
    """Moves all KV away from `sources` to instances outside `closed`.

    Args:
      table: The cluster. Not changed.
      sources: Instances on which others than those in flight are to hold nothing.
      closed: Instances that take none.
      answer: Tokens that everybody is expected to add, for which room is kept.

    Returns:
      None if there is no room, or no group for it.
    """
    topology, usable = table.snapshot.topology, frozenset(table.idle | table.soon | sources)
    targets = _Targets(table, table.everything - closed - table.late, answer)
    known = table.near if sources <= table.idle else table.census
    there = [view for view in known if not sources.isdisjoint(view.homes)]
    moves: list[Move] = []
    group: Group = ()
    for view in sorted(there, key=lambda view: (-view.computed, view.id)):
        blocks = sum(table.held_blocks(view, source) for source in view.homes & sources)
        target = targets.take(view, view.homes - sources, blocks)
        if target is None:
            return None
        if target not in group:
            cover = topology.smallest_cover(frozenset(sources | targets.used), usable)
            if cover is None:  # nor for more of them
                return None
            group = cover
        moves += [
            Move(view.id, share.instance, target, share.tokens)
            for share in view.kv
            if share.instance in sources
        ]
    return Clearing(moves=tuple(moves), group=group) if moves else None


def rooms(table: Worktable, answer: int) -> dict[InstanceId, int]:
    """Blocks that may move to each instance, so that whoever decodes there has room for so many
    tokens. How many are there is estimated: all requests are taken to hold alike.
    """
    used = sum(table.capacity) - sum(table.free)
    each = table.blocks(answer) * len(table.snapshot.running) / max(1, used)
    pairs = enumerate(zip(table.free, table.capacity, strict=True))
    return {i: free - math.ceil(each * (capacity - free)) for i, (free, capacity) in pairs}


def targets_in_order(
    table: Worktable, room: Mapping[InstanceId, int], instances: Set[InstanceId]
) -> list[InstanceId]:
    """Instances that take KV, the best first: idle ones, then those with the most room."""
    return sorted(instances, key=lambda i: (i not in table.idle, -room[i], i))


class _Targets:
    """Instances that take KV: few, and the best of them."""

    def __init__(self, table: Worktable, instances: Set[InstanceId], answer: int) -> None:
        """Leaves room for what whoever is there is expected to add: see `rooms`."""
        self._table = table
        self._answer = table.blocks(answer)
        self._room = rooms(table, answer)
        self._order = targets_in_order(table, self._room, instances)
        self.used: set[InstanceId] = set()

    def take(
        self, view: RequestView, stays: frozenset[InstanceId], blocks: int
    ) -> InstanceId | None:
        """Where a request that keeps other KV on `stays` may move; None: nowhere."""
        for target in chain(sorted(self.used), self._order):
            held = self._room[target] >= blocks
            if held and self._table.can_hold_peak(stays | {target}, view):
                self.used.add(target)
                self._room[target] -= blocks + self._answer
                return target
        return None
