"""Load on a server: requests with their times, sent over gRPC or HTTP, and what came of each.

Open loop: requests come when they come (a Poisson process, or a trace), however the server does;
closed loop: so many clients, each of which sends its next request when it has its answer.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loongjax.errors import LoongJaxError
from loongjax.sampling.params import SamplingParams
from serving.bench.http_stream import stream_completion
from serving.client import AsyncClient

Protocol: TypeAlias = Literal["grpc", "http"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A request to be sent.

    Attributes:
      arrival_s: When, from the beginning [s]; a closed loop does not look at it.
      prompt: Its tokens.
      answer_tokens: How many tokens it asks for, exactly.
    """

    arrival_s: float
    prompt: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a request; times are seconds.

    Attributes:
      tokens: That came.
      ttft_s: From sending to the first token; None: none came.
      tpot_s: Per token after the first; None: there were fewer than two.
      total_s: From sending to the end.
      error: Why it has no whole answer; None: it has.
    """

    tokens: int
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    error: str | None


class Sender:
    """Sends questions to one server. Use it as an asynchronous context manager."""

    def __init__(self, protocol: Protocol, *, grpc: str, http: str, model: str) -> None:
        self._protocol = protocol
        self._http = http
        self._model = model
        self._client = AsyncClient(grpc)

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def send(self, question: Question) -> Outcome:
        """Sends one, and listens to its end."""
        began, tokens, error = time.perf_counter(), 0, None
        first = last = began
        try:
            async with aclosing(self._counts(question)) as counts:
                async for count in counts:
                    last = time.perf_counter()
                    first = first if tokens else last
                    tokens += count
        except (LoongJaxError, OSError) as caught:
            error = str(caught)
        if error is None and tokens != question.answer_tokens:
            error = f"{tokens} tokens came, and {question.answer_tokens} were asked for"
        return Outcome(
            tokens=tokens,
            ttft_s=first - began if tokens else None,
            tpot_s=(last - first) / (tokens - 1) if tokens > 1 else None,
            total_s=time.perf_counter() - began,
            error=error,
        )

    async def _counts(self, question: Question) -> AsyncGenerator[int, None]:
        """How many tokens each piece of the answer has."""
        if self._protocol == "grpc":
            params = SamplingParams(
                temperature=0, max_tokens=question.answer_tokens, ignore_eos=True
            )
            async with aclosing(self._client.stream(question.prompt, params)) as pieces:
                async for piece in pieces:
                    if piece.token_ids:
                        yield len(piece.token_ids)
            return
        body = {
            "model": self._model,
            "prompt": question.prompt,
            "max_tokens": question.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with aclosing(stream_completion(self._http, body)) as events:
            async for event in events:
                if ids := event["choices"][0]["token_ids"]:
                    yield len(ids)


def draw_questions(
    *, count: int, rate: float, prompt_tokens: int, answer_tokens: int, vocab: int, seed: int
) -> list[Question]:
    """A Poisson process; lengths are uniform between half and one and a half of what is asked."""
    chance = random.Random(seed)
    now, found = 0.0, []
    for _ in range(count):
        length = max(1, round(prompt_tokens * chance.uniform(0.5, 1.5)))
        found.append(
            Question(
                arrival_s=now,
                prompt=tuple(chance.randrange(vocab) for _ in range(length)),
                answer_tokens=max(1, round(answer_tokens * chance.uniform(0.5, 1.5))),
            )
        )
        now += chance.expovariate(rate)
    return found


async def open_loop(sender: Sender, questions: Sequence[Question]) -> tuple[list[Outcome], float]:
    """Sends each at its time; gives the outcomes and how long it all took [s]."""
    began = time.perf_counter()

    async def send(question: Question) -> Outcome:
        await asyncio.sleep(max(0.0, began + question.arrival_s - time.perf_counter()))
        return await sender.send(question)

    outcomes = await asyncio.gather(*(send(question) for question in questions))
    return outcomes, time.perf_counter() - began


async def closed_loop(
    sender: Sender, questions: Sequence[Question], clients: int
) -> tuple[list[Outcome], float]:
    """Lets so many clients share the questions; results as of `open_loop`."""
    began, left = time.perf_counter(), iter(questions)
    outcomes: list[Outcome] = []

    async def run() -> None:
        for question in left:
            outcomes.append(await sender.send(question))

    await asyncio.gather(*(run() for _ in range(clients)))
    return outcomes, time.perf_counter() - began
