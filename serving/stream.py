"""One request's answers on their way from the engine's thread to an asyncio loop.

The engine never waits: its thread appends to a list and wakes the loop once for all that lies
there. What a slow reader has not fetched is merged when it does; it can be no more than the
request's tokens.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from loongjax.engine import Event, FinishedEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What came of one answer since the last time.

    Attributes:
      sample: Which of the request's answers, from 0.
      token_ids: New tokens; the one that ended the answer is among them.
      stopped: The last of them ended the answer, and is no part of its text.
      end: How it ended; None: it goes on.
    """

    sample: int
    token_ids: tuple[int, ...]
    stopped: bool
    end: FinishedEvent | None

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The tokens that belong to the text."""
        return self.token_ids[:-1] if self.stopped else self.token_ids


class AnswerStream:
    """The answers of one request; belongs to the loop of its bridge, and has one reader.

    Attributes:
      tokens: How many came so far, of all answers.
      ends: How answers ended, by sample, as far as they have.
    """

    def __init__(self, samples: int) -> None:
        self.tokens = 0
        self.ends: dict[int, FinishedEvent] = {}
        self._samples = samples
        self._tokens: dict[int, list[int]] = {}
        self._stopped: set[int] = set()
        self._told = 0
        self._news = asyncio.Event()

    def put(self, sample: int, event: Event) -> None:
        """Takes an event in."""
        tokens = self._tokens.setdefault(sample, [])
        if isinstance(event, FinishedEvent):
            self.ends[sample] = event
        else:
            tokens += event.token_ids
            self.tokens += len(event.token_ids)
            if event.stopped:
                self._stopped.add(sample)
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """What comes, until every answer has ended."""
        while self._told < self._samples:
            await self._news.wait()
            self._news.clear()
            tokens, self._tokens = self._tokens, {}
            for sample, ids in tokens.items():
                end = self.ends.get(sample)  # nothing comes after an end
                self._told += end is not None
                yield Progress(
                    sample=sample,
                    token_ids=tuple(ids),
                    stopped=sample in self._stopped,
                    end=end,
                )


class Bridge:
    """From the engine's thread into one asyncio loop, for all streams."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._arrived: list[tuple[AnswerStream, int, Event]] = []

    def send(self, stream: AnswerStream, sample: int, event: Event) -> None:
        """Hands an event on; called by the engine's thread, and returns at once."""
        with self._lock:
            self._arrived.append((stream, sample, event))
            is_first = len(self._arrived) == 1
        if is_first:
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for stream, sample, event in arrived:
            stream.put(sample, event)
