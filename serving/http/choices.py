"""The answers to one HTTP request, which may have several prompts, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from loongjax.engine import FinishReason
from loongjax.plan import TokenLogprobs
from serving.service import Call, Service
from serving.text import AnswerTexts


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoicePiece:
    """What came of one choice since the last time.

    Attributes:
      index: Which one: prompts in their order, the answers to each together.
      text: What is new and final of its text.
      token_ids: New tokens.
      logprobs, prompt_logprobs: As `TokensEvent` has them.
      prompt_tokens: Of its prompt.
      finish_reason: Why it ended; None: it goes on.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    prompt_tokens: int
    finish_reason: FinishReason | None


async def choices(service: Service, calls: Sequence[Call]) -> AsyncGenerator[ChoicePiece, None]:
    """Pieces of all choices, until all have ended; closing it aborts what has not.

    Raises:
      LoongJaxError: As `Service.answer` and `Service.progress`; the others are aborted then.
    """
    if len(calls) == 1:
        async with aclosing(_of_call(service, calls[0], 0)) as pieces:
            async for piece in pieces:
                yield piece
        return
    # Prompts wait for their turns by themselves: none keeps a place that another one needs.
    arrived: asyncio.Queue[ChoicePiece | None] = asyncio.Queue()
    try:
        async with asyncio.TaskGroup() as tasks:
            for place, call in enumerate(calls):
                tasks.create_task(_collect(service, call, place * call.params.n, arrived))
            for _ in calls:
                while (found := await arrived.get()) is not None:
                    yield found
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _collect(
    service: Service, call: Call, first: int, arrived: asyncio.Queue[ChoicePiece | None]
) -> None:
    async with aclosing(_of_call(service, call, first)) as pieces:
        async for piece in pieces:
            arrived.put_nowait(piece)
    arrived.put_nowait(None)


async def _of_call(service: Service, call: Call, first: int) -> AsyncGenerator[ChoicePiece, None]:
    async with service.answer(call) as answers:
        texts = AnswerTexts(service.built.tokenizer, call.params)
        async with aclosing(service.progress(answers)) as progress:
            async for piece in progress:
                yield ChoicePiece(
                    index=first + piece.sample,
                    text=texts.push(piece),
                    token_ids=piece.token_ids,
                    logprobs=piece.logprobs,
                    prompt_logprobs=piece.prompt_logprobs,
                    prompt_tokens=answers.prompt_tokens,
                    finish_reason=None if piece.end is None else piece.end.reason,
                )
