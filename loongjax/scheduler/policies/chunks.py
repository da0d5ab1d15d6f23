"""The next chunk of a prompt that has KV already, or that is too long for one step.

`LoongServe` begins no prompt in chunks that one step can hold; but a prompt may have been begun
elsewhere, or be longer than any step. It runs alone on a group that has all its KV.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from loongjax.costmodel.protocol import ChunkWork, CostModel
from loongjax.plan import Chunk, Group, InstanceId, Placement, RequestView, Share
from loongjax.scheduler.policies.worktable import Worktable


@dataclass(frozen=True, kw_only=True, slots=True)
class NextChunk:
    """A chunk, where it runs, where its KV is kept, and the new blocks that takes."""

    group: Group
    chunk: Chunk
    placement: Placement
    taken: tuple[tuple[InstanceId, int], ...]


def next_chunk(
    table: Worktable,
    view: RequestView,
    usable: Set[InstanceId],
    degrees: Sequence[int],
    cost: CostModel,
) -> NextChunk | None:
    """The chunk that gets on best with this prompt on usable instances.

    The degree is the one with the least time a token, decodes that it pauses counted in; a
    chunk is as long as a step, and the group's free blocks, allow.

    Returns:
      None if no group of these instances has its KV and a free slot.
    """
    best: tuple[float, Group, int] | None = None
    for degree in degrees:
        group = table.cover(view.homes, frozenset(usable), degree)
        if group is None:
            continue
        tokens = min(
            view.uncomputed, table.snapshot.max_chunk_tokens * len(group), _room(table, view, group)
        )
        if tokens < 1 or not table.can_hold_peak(frozenset(group), view):
            continue
        time = cost.prefill(len(group), [ChunkWork(tokens, view.computed)])
        paused = sum(table.tenants(instance).paused for instance in group)
        price = time / tokens * (1.0 + paused * view.uncomputed)
        if best is None or price < best[0]:
            best = (price, group, tokens)
    return None if best is None else _laid_out(table, view, best[1], best[2])


def _room(table: Worktable, view: RequestView, group: Group) -> int:
    """Tokens of this request that the group can take."""
    blocks = sum(table.free[instance] for instance in group)
    tail = 0 if view.tail is None else view.tail.tokens
    return tail + blocks * table.snapshot.block_size


def _laid_out(table: Worktable, view: RequestView, group: Group, tokens: int) -> NextChunk:
    """Keeps the chunk first in the request's partly filled block, then where most is free,
    on as few instances as can be.
    """
    size = table.snapshot.block_size
    order = sorted(group, key=lambda i: (-table.free[i], i))
    tail = 0
    if view.tail is not None:
        home, tail = view.tail
        order = [home, *(instance for instance in order if instance != home)]
    shares: list[Share] = []
    taken: list[tuple[InstanceId, int]] = []
    left = tokens
    for instance in order:
        kept = min(left, table.free[instance] * size + (tail if not shares else 0))
        if not kept:
            continue
        blocks = -(-max(0, kept - (tail if not shares else 0)) // size)
        shares.append(Share(instance, kept))
        taken.append((instance, blocks))
        left -= kept
        if not left:
            break
    start, end = view.computed, view.computed + tokens
    chunk = Chunk(request=view.id, start=start, length=tokens, last=end == view.length)
    placement = Placement(request=view.id, shares=tuple(shares))
    return NextChunk(group=group, chunk=chunk, placement=placement, taken=tuple(taken))
