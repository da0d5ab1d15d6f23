"""Steps in a few letters, for tests of the allocator, and a look into its books.

All groups are all instances.
"""

from __future__ import annotations

import numpy as np

from loongjax.kvcache import BlockAllocator
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    MigrateStep,
    Move,
    Placement,
    PrefillStep,
    Share,
)

INSTANCES = 3


def prefill(*parts: tuple[str, int, list[tuple[int, int]]], seq: int = 0) -> PrefillStep:
    """A step of chunks `(request, start, shares)`."""
    lengths = [sum(tokens for _, tokens in shares) for _, _, shares in parts]
    return PrefillStep(
        seq=seq,
        group=tuple(range(INSTANCES)),
        chunks=tuple(
            Chunk(request=name, start=start, length=length, last=True)
            for (name, start, _), length in zip(parts, lengths, strict=True)
        ),
        keep=tuple(
            Placement(request=name, shares=tuple(Share(*share) for share in shares))
            for name, _, shares in parts
        ),
    )


def decode(*rows: tuple[str, int], seq: int = 0) -> DecodeStep:
    """A step of rows `(request, home)`."""
    return DecodeStep(
        seq=seq,
        group=tuple(range(INSTANCES)),
        rows=tuple(DecodeRow(name, home, home) for name, home in rows),
    )


def migrate(*moves: tuple[str, int, int, int], seq: int = 0) -> MigrateStep:
    """A step of moves `(request, source, target, tokens)`."""
    return MigrateStep(
        seq=seq, group=tuple(range(INSTANCES)), moves=tuple(Move(*move) for move in moves)
    )


def entries_of(allocator: BlockAllocator, request: str, instance: int) -> np.ndarray:
    """A copy of `(slot, position, count)` of a request's blocks on an instance, [N, 3]."""
    kv = allocator._held.get(request)
    if kv is None or instance not in kv.runs:
        return np.empty((0, 3), np.int32)
    return kv.runs[instance].entries.copy()
