"""What a `MigrateStep` concerns: the places that it empties, and the blocks that it needs.

Pure functions of the books; `loongjax.kvcache.BlockAllocator` carries out what they say.
Entries are `(slot, position, count)`, positions ascending.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from loongjax.kvcache.holding import Holding
from loongjax.kvcache.refusals import refusal
from loongjax.plan import InstanceId, MigrateStep, Move, RequestId


class Cut(NamedTuple):
    """A move and its entries, as in `loongjax.kvcache.MoveSlots`; `given` lacks its slots."""

    move: Move
    taken: Int32[np.ndarray, "N 3"]
    given: Int32[np.ndarray, "M 3"]
    left: Int32[np.ndarray, "K 3"]


def cut_moves(
    step: MigrateStep,
    held: Mapping[RequestId, Holding],
    block_size: int,
) -> list[Cut]:
    """The moves of a step, one after another, each checked. Changes nothing.

    Raises:
      PlanError: There is not as much to move, or an instance is to give and to take KV of one
        request.
    """
    _check_ways(step)
    lefts: dict[tuple[RequestId, InstanceId], Int32[np.ndarray, "K 3"]] = {}
    cuts = []
    for move in step.moves:
        place = (move.request, move.source)
        before = lefts[place] if place in lefts else _entries(held, move)
        there = int(before[:, 2].sum())
        if not 1 <= move.tokens <= there:
            raise refusal(
                step,
                f"moves {move.tokens} KV tokens of request {move.request!r} away from instance "
                f"{move.source}, which holds {there} then. Move at least 1, and what is there",
            )
        left, taken = cut_newest(before, move.tokens)
        lefts[place] = left
        cuts.append(Cut(move, taken, packed(taken, block_size), left))
    return cuts


def cut_newest(
    entries: Int32[np.ndarray, "N 3"], tokens: int
) -> tuple[Int32[np.ndarray, "K 3"], Int32[np.ndarray, "M 3"]]:
    """Entries without their newest `tokens`, and those tokens' entries; it has as many.

    A block that is cut in two has an entry in both.
    """
    from_end = np.cumsum(entries[::-1, 2])
    touched = int(np.searchsorted(from_end, tokens)) + 1
    stays = int(from_end[touched - 1]) - tokens
    first = len(entries) - touched
    taken = entries[first:].copy()
    taken[0] += np.array([stays, stays, -stays], np.int32)
    left = entries[: first + (stays > 0)].copy()
    if stays:
        left[-1, 2] = stays
    return left, taken


def packed(entries: Int32[np.ndarray, "N 3"], block_size: int) -> Int32[np.ndarray, "M 3"]:
    """The same positions in as few blocks as they can lie in; slots are 0.

    All blocks are full, save the last one before each gap between positions.
    """
    position, count = entries[:, 1], entries[:, 2]
    starts = np.flatnonzero(np.append(True, position[1:] != (position + count)[:-1]))
    begin = position[starts]
    end = begin + np.add.reduceat(count, starts)
    blocks = -(-(end - begin) // block_size)
    within = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    new = np.zeros((len(within), 3), np.int32)
    new[:, 1] = np.repeat(begin, blocks) + within * block_size
    new[:, 2] = np.minimum(block_size, np.repeat(end, blocks) - new[:, 1])
    return new


def _entries(held: Mapping[RequestId, Holding], move: Move) -> Int32[np.ndarray, "N 3"]:
    kv = held.get(move.request)
    if kv is None or move.source not in kv.runs:
        return np.empty((0, 3), np.int32)
    return kv.runs[move.source].entries


def _check_ways(step: MigrateStep) -> None:
    targets = {(move.request, move.target) for move in step.moves}
    for move in step.moves:
        if (move.request, move.source) in targets:
            raise refusal(
                step,
                f"moves KV of request {move.request!r} both to instance {move.source} and away "
                "from it. Move it straight to where it shall be",
            )
