"""Retention: which instances of a prefill group keep a prompt's KV (scale-down, for free).

Keeps it on the fewest instances that have room for all that the request can need, so that
it decodes on a small group. A single one is preferred where others have KV already: they
share its steps, and the rest of the group is free for prompts. Where a prompt was begun, its
later chunks follow the first one.
"""

from __future__ import annotations

from collections.abc import Mapping

from loongjax.plan import Group, InstanceId, RequestView, Share
from loongjax.scheduler.policies.board import Board
from loongjax.scheduler.scaling import balance


def new_blocks(board: Board, view: RequestView, tokens: int) -> int:
    """Blocks that a request's next `tokens` take beyond those that it has."""
    room = view.tail.tokens if view.tail else 0
    return board.blocks(max(0, tokens - room))


def keep(
    board: Board, view: RequestView, group: Group, tokens: int
) -> tuple[tuple[Share, ...], dict[InstanceId, int]]:
    """Where a request's next `tokens` are kept; the group has room for them and its old KV.

    The block that is partly filled is filled first, and all shares but the last end with
    their blocks: so a request never has more than one block that is partly filled. The last
    goes where most is free: the next tokens follow it.

    Returns:
      Shares, in the order of the tokens, and the new blocks that they take by instance.
    """
    blocks, size = new_blocks(board, view, tokens), board.snapshot.block_size
    taken: dict[InstanceId, int] = {}
    if blocks:
        chosen = _choose(board, view, group, blocks)
        taken = balance({instance: board.free[instance] for instance in chosen}, blocks)
    return in_order(view, taken, board.free, tokens, size), taken


def in_order(
    view: RequestView,
    taken: Mapping[InstanceId, int],
    free: Mapping[InstanceId, int],
    tokens: int,
    block_size: int,
) -> tuple[Share, ...]:
    """A request's next `tokens` in the block that is partly filled, and in new ones.

    Args:
      view: The request.
      taken: New blocks by instance.
      free: Free blocks by instance, those included.
      tokens: How many fill these blocks, but for the last one.
      block_size: Tokens per block.
    """
    kept = {instance: count * block_size for instance, count in taken.items() if count}
    first = None if view.tail is None else view.tail.instance
    if view.tail is not None:
        kept[view.tail.instance] = kept.get(view.tail.instance, 0) + view.tail.tokens
    homes = sorted(
        kept,
        key=lambda home: (home != first, free[home] - taken.get(home, 0), home),
    )
    shares = [Share(home, kept[home]) for home in homes]
    surplus = sum(kept.values()) - tokens
    shares[-1] = Share(shares[-1].instance, shares[-1].tokens - surplus)
    return tuple(shares)


def _choose(board: Board, view: RequestView, group: Group, blocks: int) -> list[InstanceId]:
    """The fewest instances with room for the request's peak, or at least for its prompt, or
    for these blocks alone. Those where it has KV come first.
    """
    free, homes = board.free, view.homes
    peak = new_blocks(board, view, view.peak - view.computed)
    joinable = [
        instance
        for instance in board.occupied.intersection(group)
        if not homes and free[instance] >= peak + board.granted_on({instance})
    ]
    if joinable:
        return [max(joinable, key=lambda instance: (free[instance], -instance))]
    room = sum(free[instance] for instance in group)
    prompt = new_blocks(board, view, view.uncomputed)
    wanted = next(enough for enough in (peak, prompt, blocks) if enough <= room)
    order = sorted(group, key=lambda instance: (instance not in homes, -free[instance], instance))
    count, found = 0, 0
    while found < wanted:
        found += free[order[count]]
        count += 1
    return order[:count]
