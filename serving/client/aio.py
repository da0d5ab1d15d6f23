"""The client for asyncio. Belongs to one loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

import grpc

from loongjax.sampling.params import SamplingParams
from serving.client.connection import (
    OPTIONS,
    ClientTls,
    RetryPolicy,
    call_metadata,
    to_error,
)
from serving.client.messages import (
    Answer,
    AnswerBuilder,
    BatchAnswer,
    Piece,
    Prompt,
    to_batch,
    to_batch_answer,
    to_piece,
    to_prompt,
    to_request,
)
from serving.stubs import inference_pb2 as pb
from serving.stubs import inference_pb2_grpc as pb_grpc


class AsyncClient:
    """A connection to a server; see `Client`, whose methods these are.

    To be made inside a running loop. Streams are cancelled by closing them (`aclosing`), and with
    the task that reads them.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: ClientTls | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Connects when it is first needed; arguments as of `Client`."""
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, tls.credentials(), options=OPTIONS)
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._metadata = call_metadata(token)
        self._retry = retry or RetryPolicy()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Answer:
        """The whole answer to a prompt."""
        answer = AnswerBuilder()
        pieces = self.stream(
            prompt, params, priority=priority, request_id=request_id, timeout_s=timeout_s
        )
        async with aclosing(pieces):
            async for piece in pieces:
                answer.add(piece)
        return answer.build()

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """The answer to a prompt, piece by piece."""
        request = to_request(prompt, params, priority, request_id)
        async with aclosing(self._stream(self._stub.Generate, request, timeout_s)) as responses:
            async for response in responses:
                yield to_piece(response)

    async def batch(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[BatchAnswer, None]:
        """Answers to many prompts, in the order in which they end."""
        request = to_batch(prompts, params, priority)
        call = self._stream(self._stub.GenerateBatch, request, timeout_s)
        async with aclosing(call) as responses:
            async for response in responses:
                yield to_batch_answer(response)

    async def tokenize(self, prompt: Prompt, *, add_special: bool = True) -> tuple[int, ...]:
        """The token ids of a text or a chat."""
        request = pb.TokenizeRequest(prompt=to_prompt(prompt), add_special=add_special)
        return tuple((await self._once(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text of tokens."""
        request = pb.DetokenizeRequest(token_ids=token_ids, keep_special=keep_special)
        return (await self._once(self._stub.Detokenize, request)).text

    async def close(self) -> None:
        """Ends the connection, and with it what runs over it."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _stream(
        self, method: Callable[..., Any], request: Any, timeout_s: float | None
    ) -> AsyncGenerator[Any, None]:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        attempt, has_begun = 1, False
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            call = method(request, timeout=left, metadata=self._metadata)
            try:
                async for response in call:
                    has_begun = True
                    yield response
                return
            except grpc.aio.AioRpcError as caught:
                await self._wait_or_raise(caught, attempt, has_begun)
            finally:
                call.cancel()
            attempt += 1

    async def _once(self, method: Callable[..., Any], request: Any) -> Any:
        attempt = 1
        while True:
            try:
                return await method(request, metadata=self._metadata)
            except grpc.aio.AioRpcError as caught:
                await self._wait_or_raise(caught, attempt, has_begun=False)
            attempt += 1

    async def _wait_or_raise(
        self, caught: grpc.aio.AioRpcError, attempt: int, has_begun: bool
    ) -> None:
        error = to_error(caught)
        wait_s = self._retry.wait_s(error, attempt, has_begun)
        if wait_s is None:
            raise error from None
        await asyncio.sleep(wait_s)
