"""Whose prompt is computed first: whoever has waited longest, by how long it takes.

    urgency = (waited + 2 s) / (time that it takes alone on all instances)^0.8

That time is the geometric mean of what the whole prompt takes and what its rest does. So a short
prompt overtakes a long one soon after it came, others of its length do not interrupt who is nearly
done, and the longest one goes first in the end (as in highest response ratio next). When many wait,
the short ones' urgency grows fastest: an overload reaches the longest first.

Who has a deadline that can still be met goes before the others when it has to begin.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from loongjax.costmodel.protocol import ChunkWork, CostModel
from loongjax.plan import RequestId, RequestView

_SIZES = tuple(1 << power for power in range(22))
_KEPT = 1 << 16
"""Lengths of prompts whose times are kept."""
_LEAST_S = 1e-3
_HEAD_START_S = 2.0
"""As if everyone had waited so long when it came: of those who just came, the shortest is first."""
_EVENNESS = 0.8
"""1: who waits is served after a time in proportion to its own; 0: in the order of arrival."""

_GUARD = 0.5
_GUARD_S = 0.5
"""Who has a deadline has to begin when so much of what is left of it, and so many seconds more,
are left besides: it is hardly ever alone."""


class AloneTimes:
    """What prompts take alone on all instances: the same in every plan, and asked for by thousands
    who wait, so it is interpolated and kept.
    """

    def __init__(self, cost: CostModel, degree: int, floor_s: float) -> None:
        """`degree`: of all instances. What takes less than `floor_s` counts as if it took that."""
        self._cost = cost
        self._degree = degree
        self._floor_s = floor_s
        self.whole_s = lru_cache(_KEPT)(self._interpolated_s)
        """By tokens of a prompt [s]."""
        self.weight = lru_cache(_KEPT)(self._weighed)
        """By tokens of a prompt of which nothing is computed: what its wait is divided by."""

    def rest_s(self, view: RequestView) -> float:
        """What is left of it takes, about [s]."""
        if not view.computed:
            return self.whole_s(view.length)
        work = ChunkWork(max(1, view.uncomputed), view.computed)
        return self._cost.prefill(self._degree, [work])

    def at_least_s(self, seconds: float) -> float:
        """As what a time counts [s]."""
        return max(seconds, self._floor_s, _LEAST_S)

    def weigh(self, seconds: float) -> float:
        """What the wait of a prompt that takes so long is divided by."""
        return self.at_least_s(seconds) ** _EVENNESS

    def _weighed(self, tokens: int) -> float:
        return self.weigh(self.whole_s(tokens))

    def _interpolated_s(self, tokens: int) -> float:
        right = min(max(bisect_left(_SIZES, tokens), 1), len(_SIZES) - 1)
        low, high = _SIZES[right - 1], _SIZES[right]
        first, second = self._exactly_s(low), self._exactly_s(high)
        return first + (second - first) * (tokens - low) / (high - low)

    def _exactly_s(self, tokens: int) -> float:
        return self._cost.prefill(self._degree, [ChunkWork(tokens, 0)])


class Order:
    """Urgency in one plan."""

    def __init__(self, alone: AloneTimes, now: float) -> None:
        self._alone = alone
        self._now = now

    def rest_s(self, view: RequestView) -> float:
        """What is left of it takes on all instances, about [s]."""
        return self._alone.rest_s(view)

    def stretch(self, view: RequestView) -> float:
        """How many times as long as all of it takes alone it has waited."""
        alone = self._alone
        return (self._now - view.arrival) / alone.at_least_s(alone.whole_s(view.length))

    def urgency(self, view: RequestView) -> float:
        """See the module."""
        alone = self._alone
        waited = self._now - view.arrival + _HEAD_START_S
        if not view.computed:
            return waited / alone.weight(view.length)
        seconds = math.sqrt(self.rest_s(view) * alone.whole_s(view.length))
        return waited / alone.weigh(seconds)

    def slack_s(self, view: RequestView) -> float:
        """How long a request may wait and have its prompt computed by its deadline, if it is then
        alone [s]; infinite without one, negative if it cannot.
        """
        if view.deadline is None:
            return math.inf
        return view.deadline - self._now - self.rest_s(view)

    def _has_to_begin(self, view: RequestView) -> bool:
        slack = self.slack_s(view)
        return 0.0 <= slack <= _GUARD * self.rest_s(view) + _GUARD_S

    def first(self, views: Sequence[RequestView], count: int) -> list[RequestView]:
        """The first ones, by priority and then by urgency."""
        return heapq.nsmallest(count, self._candidates(views, count), key=self._key)

    def _candidates(self, views: Sequence[RequestView], count: int) -> Sequence[RequestView]:
        """Those among whom the first ones are: of thousands who came and have nothing that sets
        them apart only the most urgent are compared in full.
        """
        if len(views) <= 2 * count:
            return views
        plain: list[RequestView] = []
        found: list[RequestView] = []
        for view in views:
            is_plain = not view.computed and not view.priority and view.deadline is None
            (plain if is_plain else found).append(view)
        urgencies = [self.urgency(view) for view in plain]
        least = min(heapq.nlargest(count, urgencies), default=math.inf)
        found += [view for view, each in zip(plain, urgencies, strict=True) if each >= least]
        return found

    def _key(self, view: RequestView) -> tuple[int, bool, float, float, RequestId]:
        late = view.deadline is None or not self._has_to_begin(view)
        return (-view.priority, late, -self.urgency(view), view.arrival, view.id)
