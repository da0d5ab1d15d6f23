"""Which decodes go on by themselves (`Plan.ahead`): those of groups that nobody waits for.

Somebody waits for an instance (`Board.wanted`) who would use it now, were it idle: a prompt, a
decode that has no other turn or place, a request whose KV could come together. Memory alone is
no reason: it is free when somebody ends, and then everything is planned anew.
"""

from __future__ import annotations

from collections.abc import Iterable

from loongjax.plan import Group, InstanceId, RequestView
from loongjax.scheduler.policies.board import Board
from loongjax.scheduler.policies.seats import parts


def groups_to_go_on(board: Board, planned: Iterable[Group]) -> frozenset[Group]:
    """Groups that decode by this plan, or already, and may go on as they are.

    Comes last, when everybody had a chance to say what they wait for.
    """
    going = {group for group in planned if board.wanted.isdisjoint(group)}
    going.update(group for group in _decoding(board) if board.wanted.isdisjoint(group))
    return frozenset(going)


def _decoding(board: Board) -> list[Group]:
    """Groups of steps in flight, of those that would be planned again as they are."""
    groups: dict[int, list[InstanceId]] = {}
    for instance in board.snapshot.instances:
        if instance.busy_seq is not None and instance.id in board.soon:
            groups.setdefault(instance.busy_seq, []).append(instance.id)
    rows: dict[int, list[RequestView]] = {seq: [] for seq in groups}
    for view in board.snapshot.running:
        if view.last_seq in rows and view.computed < view.peak:
            rows[view.last_seq].append(view)
    return [
        tuple(group) for seq, group in groups.items() if _is_needed(board, tuple(group), rows[seq])
    ]


def _is_needed(board: Board, group: Group, rows: list[RequestView]) -> bool:
    """Whether these decode together, and on no smaller group."""
    if not rows:
        return False
    together = parts(view.homes for view in rows)
    if len(together) > 1:
        return False
    least = -(-len(rows) // board.snapshot.max_rows)
    smallest = board.snapshot.topology.smallest_cover(together[0], frozenset(group), least)
    return smallest == group
