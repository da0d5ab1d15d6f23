"""Retention: which instances of a prefill group keep a prompt's KV (scale-down, for free).

Keeps it on the fewest instances that have room for all that the request can need, so that
it decodes on a small group. A single one is preferred where others decode already: they
share its steps, and the rest of the group is free for prompts.
"""

from __future__ import annotations

from loongjax.plan import Group, InstanceId, RequestView, Share
from loongjax.scheduler.policies.board import Board


def keep(board: Board, view: RequestView, group: Group) -> tuple[Share, ...]:
    """Shares of a whole prompt, in the order of its tokens; the group has room for it.

    All but the last are whole blocks, so that a request never has more than one block that
    is partly filled. The last goes where most is free: the next tokens follow it.
    """
    blocks = board.blocks(view.length)
    chosen = _choose(board, view, group)
    taken = _balance({instance: board.free[instance] for instance in chosen}, blocks)
    homes = sorted(
        (instance for instance in chosen if taken[instance]),
        key=lambda instance: (board.free[instance] - taken[instance], instance),
    )
    size = board.snapshot.block_size
    shares = [Share(home, taken[home] * size) for home in homes]
    surplus = blocks * size - view.length
    shares[-1] = Share(shares[-1].instance, shares[-1].tokens - surplus)
    return tuple(shares)


def _choose(board: Board, view: RequestView, group: Group) -> list[InstanceId]:
    """The fewest instances with room for the request's peak, or at least for its prompt."""
    free, peak = board.free, board.blocks(view.peak)
    joinable = [
        instance
        for instance in board.occupied.intersection(group)
        if free[instance] >= peak + board.growth_on({instance})
    ]
    if joinable:
        return [max(joinable, key=lambda instance: (free[instance], -instance))]
    by_room = sorted(group, key=lambda instance: (-free[instance], instance))
    if sum(free[instance] for instance in group) < peak:
        peak = board.blocks(view.length)
    count, room = 0, 0
    while room < peak:
        room += free[by_room[count]]
        count += 1
    return by_room[:count]


def _balance(free: dict[InstanceId, int], blocks: int) -> dict[InstanceId, int]:
    """Blocks to take from each, so that what remains free is as equal as it can be."""
    level = max(0, (sum(free.values()) - blocks) // len(free))
    taken = {instance: max(0, room - level) for instance, room in free.items()}
    surplus = sum(taken.values()) - blocks
    for instance in sorted(free, key=lambda instance: (free[instance], -instance)):
        less = min(taken[instance], surplus)
        taken[instance] -= less
        surplus -= less
    return taken
