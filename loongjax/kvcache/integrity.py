"""Proves that the books of the KV pool add up, from the entries alone.

Reads what `BlockAllocator` keeps and changes nothing. Costs O(all blocks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loongjax.errors import IntegrityError
from loongjax.kvcache.blocks import Blocks
from loongjax.kvcache.holding import Holding, Run
from loongjax.plan import InstanceId, RequestId

_HINT = "This is a fault of loongjax; the KV pool must be rebuilt."


def check_books(
    blocks: Sequence[Blocks], held: Mapping[RequestId, Holding], block_size: int
) -> None:
    """Every block is held exactly as often as counted, or free; entries fit their blocks and
    contradict none; positions of a request are exactly 0 to computed - 1. Of a shared block,
    holders may have different parts.

    Raises:
      IntegrityError: With the numbers that do not match.
    """
    claims = [_Claims(instance, pool.count) for instance, pool in enumerate(blocks)]
    for request, kv in held.items():
        for instance, run in kv.runs.items():
            claims[instance].add(request, kv, run, block_size)
        _check_positions(request, kv)
    for instance, (claimed, pool) in enumerate(zip(claims, blocks, strict=True)):
        _check_blocks(instance, pool, claimed.holders)


class _Claims:
    """What the requests say of one instance's blocks.

    Attributes:
      holders: [blocks], how many requests have an entry in each block.
    """

    def __init__(self, instance: InstanceId, count: int) -> None:
        self._instance = instance
        self._entries = np.zeros((count, 3), np.int32)
        self._families = np.zeros(count, np.int64)
        self.holders = np.zeros(count, np.int32)

    def add(self, request: RequestId, kv: Holding, run: Run, block_size: int) -> None:
        """Checks a run by itself and against those before: only a family shares blocks, and
        agrees on what lies there, though a move may have taken the end of it from one of them.
        """
        where = f"request {request!r} on instance {self._instance}"
        entries = run.entries
        slots, counts = entries[:, 0], entries[:, 2]
        blocks = slots // block_size
        fits = (slots % block_size == 0) & (counts >= 1) & (counts <= block_size)
        fits &= (slots >= 0) & (blocks < len(self.holders))
        if not fits.all():
            raise IntegrityError(
                f"{where}: entry {entries[~fits][0].tolist()} is not within one of "
                f"{len(self.holders)} blocks of {block_size} slots. {_HINT}"
            )
        if len(np.unique(blocks)) != len(blocks):
            raise IntegrityError(
                f"{where}: {len(blocks)} entries overlap in {len(np.unique(blocks))} blocks. "
                f"{_HINT}"
            )
        if counts.sum() != run.tokens:
            raise IntegrityError(
                f"{where}: entries hold {counts.sum()} tokens, booked are {run.tokens}. {_HINT}"
            )
        if (np.diff(entries[:, 1]) <= 0).any():
            raise IntegrityError(
                f"{where}: positions {entries[:, 1].tolist()} do not ascend. {_HINT}"
            )
        family = id(kv) if kv.family is None else id(kv.family)
        differs = (self._entries[blocks] != entries)[:, :2].any(1)
        differs |= self._families[blocks] != family
        differs &= self.holders[blocks] > 0
        if differs.any():
            raise IntegrityError(
                f"{where}: entry {entries[differs][0].tolist()} overlaps entry "
                f"{self._entries[blocks[differs][0]].tolist()} of another request. {_HINT}"
            )
        self._entries[blocks] = entries
        self._families[blocks] = family
        self.holders[blocks] += 1


def _check_positions(request: RequestId, kv: Holding) -> None:
    """The entries of all instances follow each other without gap, up to the newest token."""
    if not any(len(run.entries) for run in kv.runs.values()):
        raise IntegrityError(
            f"request {request!r}: no entries, booked are {kv.computed} tokens. {_HINT}"
        )
    entries = np.concatenate([run.entries for run in kv.runs.values()])
    homes = np.repeat(list(kv.runs), [len(run.entries) for run in kv.runs.values()])
    order = np.argsort(entries[:, 1], kind="stable")
    slots, positions, counts = entries[order].T
    ends = np.cumsum(counts)
    if ends[-1] != kv.computed or (positions != ends - counts).any():
        raise IntegrityError(
            f"request {request!r}: {ends[-1]} tokens from position {positions[0]} on, in "
            f"{len(slots)} entries, are not positions 0 to {kv.computed - 1} once each. {_HINT}"
        )
    newest = (int(homes[order[-1]]), int(slots[-1] + counts[-1]))
    if newest != (kv.last_instance, kv.next_slot):
        raise IntegrityError(
            f"request {request!r}: (instance, slot) behind its newest token is {newest}, booked "
            f"is {(kv.last_instance, kv.next_slot)}. {_HINT}"
        )


def _check_blocks(instance: InstanceId, pool: Blocks, holders: np.ndarray) -> None:
    """Reference counts are what the requests hold; all other blocks are free, once each."""
    wrong = np.flatnonzero(holders != pool.references)
    if len(wrong):
        block = int(wrong[0])
        raise IntegrityError(
            f"instance {instance}: block {block} has {holders[block]} holders, counted are "
            f"{pool.references[block]}; {len(wrong)} such blocks. {_HINT}"
        )
    free = pool.free_ids()
    taken = int((holders > 0).sum())
    free_once = len(np.unique(free)) == len(free) and not holders[free].any()
    if not free_once or taken + len(free) != pool.count:
        raise IntegrityError(
            f"instance {instance}: {taken} blocks held and {len(free)} free "
            f"({len(np.unique(free))} different, {int((holders[free] > 0).sum())} of them held) "
            f"of {pool.count}. {_HINT}"
        )
