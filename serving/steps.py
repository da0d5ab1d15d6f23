"""The steps of an engine as they end, for whoever wants to follow: metrics, and watchers.

Looks at the engine once a second, more often while somebody follows, and only at what is new. A
follower who is slow loses the oldest steps, and never holds anybody up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

from loongjax.engine import Engine, StepRecord

_LOOK_S = 1.0
_FOLLOWED_S = 0.1
_MOST_KEPT = 10_000


class StepFeed:
    """Hands steps out; belongs to one asyncio loop.

    Attributes:
      listeners: Called with the steps that ended since the last time.
    """

    def __init__(
        self, engine: Engine, listeners: Sequence[Callable[[Sequence[StepRecord]], None]] = ()
    ) -> None:
        self.listeners = list(listeners)
        self._engine = engine
        self._seen = 0

    async def run(self) -> None:
        """Follows the engine until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_LOOK_S)

    def look(self) -> None:
        """Hands out what is new."""
        records, self._seen = self._engine.steps_since(self._seen)
        if records:
            for listener in self.listeners:
                listener(records)

    @contextmanager
    def follow(self) -> Iterator[AsyncIterator[StepRecord]]:
        """Every step that ends from now on, for as long as the block runs."""
        kept: deque[StepRecord] = deque(maxlen=_MOST_KEPT)
        self.look()  # what has ended is not for this follower
        self.listeners.append(kept.extend)
        try:
            yield self._each(kept)
        finally:
            self.listeners.remove(kept.extend)

    async def _each(self, kept: deque[StepRecord]) -> AsyncIterator[StepRecord]:
        while True:
            self.look()
            while kept:
                yield kept.popleft()
            await asyncio.sleep(_FOLLOWED_S)
