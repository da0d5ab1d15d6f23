"""Which decodes go on by themselves (`Plan.ahead`): those of groups that nobody waits for.

Somebody waits for an instance (`Board.wanted`) who would use it now, were it idle: a prompt, a
decode that has no other turn or place, a request whose KV could come together. Memory alone is
no reason: it is free when somebody ends, and then everything is planned anew.
"""

from __future__ import annotations

from collections.abc import Iterable

from loongjax.plan import Group, RequestView
from loongjax.scheduler.policies.board import Board
from loongjax.scheduler.policies.seats import groups_in_flight, parts


def groups_to_go_on(board: Board, planned: Iterable[Group]) -> frozenset[Group]:
    """Groups that decode by this plan, or already, and may go on as they are.

    Comes last, when everybody had a chance to say what they wait for.
    """
    going = {group for group in planned if board.wanted.isdisjoint(group)}
    for group, rows in groups_in_flight(board.snapshot, board.soon).items():
        if board.wanted.isdisjoint(group) and _is_needed(board, group, rows):
            going.add(group)
    return frozenset(going)


def _is_needed(board: Board, group: Group, rows: list[RequestView]) -> bool:
    """Whether these decode together, and on no smaller group."""
    together = parts(view.homes for view in rows)
    if len(together) > 1:
        return False
    least = -(-len(rows) // board.snapshot.max_rows)
    smallest = board.snapshot.topology.smallest_cover(together[0], frozenset(group), least)
    return smallest == group
