"""Whose prompt is computed first: whoever has least time left, by a due time that grows with its
length.

A prompt is due `factor` times what it takes alone on all instances after it came, and `floor_s` at
least. So a short one goes before a long one that came long before it, and the long one goes first
in the end. What counts as left is what is not computed yet.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

from loongjax.costmodel.protocol import ChunkWork, CostModel
from loongjax.plan import RequestId, RequestView

_SIZES = tuple(1 << power for power in range(22))


class Order:
    """Due times in one plan. Times alone are interpolated, for there may be thousands of them."""

    def __init__(self, cost: CostModel, degree: int, factor: float, floor_s: float) -> None:
        """`degree`: of all instances."""
        self._cost = cost
        self._degree = degree
        self._factor = factor
        self._floor_s = floor_s
        self._alone = [cost.prefill(degree, [ChunkWork(size, 0)]) for size in _SIZES]

    def alone_s(self, tokens: int) -> float:
        """What a prompt takes alone on all instances, about [s]."""
        right = min(max(bisect_left(_SIZES, tokens), 1), len(_SIZES) - 1)
        low, high = _SIZES[right - 1], _SIZES[right]
        first, second = self._alone[right - 1], self._alone[right]
        return first + (second - first) * (tokens - low) / (high - low)

    def latest(self, view: RequestView) -> float:
        """When the rest of a prompt has to begin, so that it is in time [s, engine clock]."""
        alone = rest = self.alone_s(view.length)
        if view.computed:
            work = ChunkWork(max(1, view.uncomputed), view.computed)
            rest = self._cost.prefill(self._degree, [work])
        due = view.arrival + max(self._floor_s, self._factor * alone)
        return (due if view.deadline is None else min(due, view.deadline)) - rest

    def first(self, views: Sequence[RequestView], count: int) -> list[RequestView]:
        """The first ones, by priority and then by the time that they have left."""
        return heapq.nsmallest(count, views, key=self._key)

    def _key(self, view: RequestView) -> tuple[int, float, RequestId]:
        return (-view.priority, self.latest(view), view.id)
