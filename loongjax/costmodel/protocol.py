"""What a policy may ask about time. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable


class ChunkWork(NamedTuple):
    """A chunk of a prefill step: `tokens` new ones, over `history` tokens computed before."""

    tokens: int
    history: int


class DecodeWork(NamedTuple):
    """A decode step: `rows` requests that hold `kv_tokens` in all, run by `masters` ranks.

    `longest` are the KV tokens of the request that has most, whose attention has the least
    parallelism; None: all are alike.
    """

    rows: int
    kv_tokens: int
    masters: int
    longest: int | None = None


@runtime_checkable
class CostModel(Protocol):
    """Predicts the duration of steps [s], by degree of their group."""

    def prefill(self, degree: int, chunks: Sequence[ChunkWork]) -> float:
        """A prefill step."""
        ...

    def decode(self, degree: int, work: DecodeWork) -> float:
        """A decode step."""
        ...

    def migrate(self, tokens: int) -> float:
        """Moving KV between two instances."""
        ...
