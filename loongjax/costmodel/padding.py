"""Steps are rounded up to what is compiled, and take as long as the next larger size does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """The sizes of an engine's programs.

    Attributes:
      chunks: Tokens of a prefill step on each rank, ascending.
      resumed: Those of them that steps with history have.
      tile: Queries of each rank that attend to history together: a chunk is rounded up to tiles
        there. (The tiles of a chunk without history do not matter: its attention is short.)
      rows: Rows of a decode step on each rank, ascending. Every rank computes as many as the
        busiest master.
    """

    chunks: tuple[int, ...]
    resumed: tuple[int, ...]
    tile: int
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("chunks", "resumed", "rows"):
            sizes: tuple[int, ...] = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ConfigError(f"sizes of {name} must ascend from at least 1, not {sizes}")
        if self.tile < 1:
            raise ConfigError(f"a tile must have at least 1 query, not {self.tile}")

    def tokens(self, degree: int, chunks: Sequence[ChunkWork]) -> int:
        """What a prefill step computes on all ranks together."""
        local, resumes = 0, False
        for length, history in chunks:
            local += -(-length // degree)
            resumes = resumes or history > 0
        return degree * _up(local, self.resumed if resumes else self.chunks)

    def tiled(self, degree: int, chunks: Sequence[ChunkWork]) -> list[ChunkWork]:
        """The chunks, of those with history as much as attends to it."""
        step = degree * self.tile
        return [
            ChunkWork(-(-length // step) * step, history) if history else ChunkWork(length, 0)
            for length, history in chunks
        ]

    def work(self, degree: int, work: DecodeWork) -> DecodeWork:
        """What a decode step computes: as many rows on every rank."""
        rows = degree * _up(-(-work.rows // work.masters), self.rows)
        longest = work.longest
        if longest is None:
            longest = -(-work.kv_tokens // max(1, work.rows))
        return DecodeWork(rows, work.kv_tokens, degree, longest)


def _up(size: int, sizes: Sequence[int]) -> int:
    """The next larger of the sizes; beyond the last, the size itself."""
    place = bisect_left(sizes, size)
    return sizes[place] if place < len(sizes) else size
