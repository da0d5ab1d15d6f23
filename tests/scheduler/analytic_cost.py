"""A cost model in a few lines, in the shape of the paper's, for tests of the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loongjax.costmodel.protocol import ChunkWork, DecodeWork


@dataclass(frozen=True, kw_only=True)
class AnalyticCost:
    """Times [s] of degree n; the defaults are near those of a 7B model on two A800 each.

    prefill = constant + hop * n + (token * sum(len) + square * sum(len^2 + 2 len history)) / n
    decode  = weights + collective * (n > 1) + kv * tokens / n + row * rows / masters
    """

    constant: float = 12e-3
    hop: float = 6e-3
    token: float = 4e-5
    square: float = 7.76e-7 * 1e-3
    weights: float = 18e-3
    collective: float = 2e-3
    kv: float = 2e-7
    row: float = 8e-5
    moved: float = 1.2e-6

    def prefill(self, degree: int, chunks: Sequence[ChunkWork]) -> float:
        work = sum(
            self.token * chunk.tokens
            + self.square * chunk.tokens * (chunk.tokens + 2 * chunk.history)
            for chunk in chunks
        )
        return self.constant + self.hop * degree + work / degree

    def decode(self, degree: int, work: DecodeWork) -> float:
        shared = self.weights + self.collective * (degree > 1)
        return shared + self.kv * work.kv_tokens / degree + self.row * work.rows / work.masters

    def migrate(self, tokens: int) -> float:
        return self.moved * tokens
