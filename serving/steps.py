"""The steps of an engine as they end, for whoever wants to follow: metrics, and watchers.

Looks at the engine every `_LOOK_S`, and only at what is new. A follower who is slow loses the
oldest steps, and never holds anybody up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

from loongjax.engine import Engine, StepRecord

_LOOK_S = 0.1
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
        news = asyncio.Event()

        def listener(records: Sequence[StepRecord]) -> None:
            kept.extend(records)
            news.set()

        self.look()  # what has ended is not for this follower
        self.listeners.append(listener)
        try:
            yield _each(kept, news)
        finally:
            self.listeners.remove(listener)


async def _each(kept: deque[StepRecord], news: asyncio.Event) -> AsyncIterator[StepRecord]:
    while True:
        await news.wait()
        news.clear()
        while kept:
            yield kept.popleft()
