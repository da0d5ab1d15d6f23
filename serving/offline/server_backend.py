"""Lines answered by a running server."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import cast

from loongjax.api.outputs import CompletionOutput
from loongjax.engine import FinishReason
from loongjax.errors import RequestError
from loongjax.offline.backend import LineFailedError
from loongjax.offline.task import Answer, Prompt
from loongjax.sampling.params import SamplingParams
from serving.client import AsyncClient, ServerError
from serving.client.messages import AnswerBuilder


class ServerBackend:
    """See `loongjax.offline.backend.Backend`. The client stays its owner's.

    A server that is busy is asked again for as long as it says so. One that ends is asked again
    as the client's `RetryPolicy` says, also for answers that had begun.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._generated = 0

    @property
    def generated_tokens(self) -> int:
        """Tokens that came so far."""
        return self._generated

    def degrees(self) -> tuple[int, ...]:
        """Not known here."""
        return ()

    async def answer(self, prompt: Prompt, params: SamplingParams) -> Answer:
        """See `Backend.answer`."""
        while True:
            answer = AnswerBuilder()
            has_begun = False
            try:
                async with aclosing(self._client.stream(prompt, params)) as pieces:
                    async for piece in pieces:
                        has_begun = True
                        self._generated += len(piece.token_ids)
                        answer.add(piece)
                break
            except ServerError as error:
                await _wait_or_raise(error, has_begun)
        whole = answer.build()
        if any(each.finish_reason == "abort" for each in whole.completions):
            raise LineFailedError("the server aborted the request")
        return Answer(
            prompt_tokens=whole.prompt_tokens,
            completions=tuple(
                CompletionOutput(
                    index=each.index,
                    token_ids=each.token_ids,
                    text=each.text,
                    finish_reason=cast(FinishReason, each.finish_reason),
                    stop_token=each.stop_token,
                    stop_text=each.stop_text,
                    logprobs=None if params.logprobs is None else each.logprobs,
                )
                for each in whole.completions
            ),
            prompt_logprobs=whole.completions[0].prompt_logprobs,
        )


async def _wait_or_raise(error: ServerError, has_begun: bool) -> None:
    message = str(error).removeprefix(f"{error.code}: ")
    if error.code == "RESOURCE_EXHAUSTED" and error.retry_after_s is not None:
        await asyncio.sleep(error.retry_after_s)
    elif error.code in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"):  # or too large a message
        raise RequestError(message) from error
    elif error.code == "INTERNAL":
        raise LineFailedError(message) from error
    elif not (error.code == "UNAVAILABLE" and has_begun):
        raise error
