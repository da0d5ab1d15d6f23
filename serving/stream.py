"""One request's answers on their way from the engine's thread to an asyncio loop.

The engine never waits: its thread appends to a list and wakes the loop once for all that lies
there. What a slow reader has not fetched is merged when it does; it can be no more than the
request's tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from loongjax.engine import Event, FinishedEvent, TokensEvent
from loongjax.plan import TokenLogprobs

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What came of one answer since the last time.

    Attributes:
      sample: Which of the request's answers, from 0.
      token_ids: New tokens; the one that ended the answer is among them.
      stopped: The last of them ended the answer, and is no part of its text.
      logprobs, prompt_logprobs: As `TokensEvent` has them.
      end: How it ended; None: it goes on.
    """

    sample: int
    token_ids: tuple[int, ...]
    stopped: bool
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    end: FinishedEvent | None


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
        self._news: dict[int, _News] = {}
        self._told = 0
        self._arrived = asyncio.Event()

    def put(self, sample: int, event: Event) -> None:
        """Takes an event in."""
        news = self._news.setdefault(sample, _News())
        if isinstance(event, FinishedEvent):
            self.ends[sample] = news.end = event
        else:
            news.tokens.append(event)
            self.tokens += len(event.token_ids)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Progress]:
        """What comes, until every answer has ended."""
        while self._told < self._samples:
            await self._arrived.wait()
            self._arrived.clear()
            # While the reader is away more may come, of any answer: it is for the next round.
            taken, self._news = self._news, {}
            for sample, news in taken.items():
                self._told += news.end is not None
                yield Progress(
                    sample=sample,
                    token_ids=_joined(event.token_ids for event in news.tokens),
                    stopped=any(event.stopped for event in news.tokens),
                    logprobs=_joined(event.logprobs for event in news.tokens),
                    prompt_logprobs=_joined(event.prompt_logprobs for event in news.tokens),
                    end=news.end,
                )


@dataclass(kw_only=True, slots=True)
class _News:
    """What has come of one answer since its reader last took it."""

    tokens: list[TokensEvent] = field(default_factory=list)
    end: FinishedEvent | None = None


def _joined(parts: Iterable[tuple[_T, ...]]) -> tuple[_T, ...]:
    return tuple(itertools.chain.from_iterable(parts))


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
