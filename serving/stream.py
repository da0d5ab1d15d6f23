"""One request's answers on their way from the engine's thread to an asyncio loop.

The engine never waits: its thread appends to a list and wakes the loop once for all that lies
there. What a slow reader has not fetched is merged when it does; it can be no more than the
request's tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from loongjax.engine import Event, FinishedEvent, TokensEvent
from loongjax.plan import TokenLogprobs

_T = TypeVar("_T")


class Progress(NamedTuple):
    """What came of one answer since the last time; made for each token, so it is a quick type.

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
        self._reader: asyncio.Future[None] | None = None

    def put(self, sample: int, event: Event) -> None:
        """Takes an event in."""
        news = self._news.get(sample)
        if news is None:
            news = self._news[sample] = _News()
        if isinstance(event, FinishedEvent):
            self.ends[sample] = news.end = event
        else:
            news.tokens.append(event)
            self.tokens += len(event.token_ids)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[Progress]:
        """What came since the last time, as soon as there is anything; nothing after the end."""
        if not self._news and self._told < self._samples:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        taken, self._news = self._news, {}
        self._told += sum(news.end is not None for news in taken.values())
        return [news.progress(sample) for sample, news in taken.items()]


@dataclass(kw_only=True, slots=True)
class _News:
    """What has come of one answer since its reader last took it."""

    tokens: list[TokensEvent] = field(default_factory=list)
    end: FinishedEvent | None = None

    def progress(self, sample: int) -> Progress:
        """All of it at once."""
        return Progress(
            sample=sample,
            token_ids=_joined([event.token_ids for event in self.tokens]),
            stopped=bool(self.tokens) and self.tokens[-1].stopped,
            logprobs=_joined([event.logprobs for event in self.tokens]),
            prompt_logprobs=_joined([event.prompt_logprobs for event in self.tokens]),
            end=self.end,
        )


def _joined(parts: Sequence[tuple[_T, ...]]) -> tuple[_T, ...]:
    return parts[0] if len(parts) == 1 else tuple(itertools.chain.from_iterable(parts))


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
