"""The client for programs that wait. Threads may share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

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

T = TypeVar("T")


class Client:
    """A connection to a server.

    Every method that talks to it raises `ServerError`, and `RequestError` for a prompt that cannot
    be sent. `timeout_s` is the request's deadline, of all attempts together [s]; None: none.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: ClientTls | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Connects when it is first needed.

        Args:
          address: `HOST:PORT` of the server's gRPC side.
          token: A bearer token, if the server asks for one; sent over TLS or to this machine alone
            if you take care: without `tls` it is not encrypted.
          tls: How to encrypt; None: not at all.
          retry: What is tried again; None: `RetryPolicy()`.
        """
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options=OPTIONS)
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._metadata = call_metadata(token)
        self._retry = retry or RetryPolicy()

    def generate(
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
        for piece in self.stream(
            prompt, params, priority=priority, request_id=request_id, timeout_s=timeout_s
        ):
            answer.add(piece)
        return answer.build()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Iterator[Piece]:
        """The answer to a prompt, piece by piece; leaving the loop cancels the request."""
        request = to_request(prompt, params, priority, request_id)
        for response in self._stream(self._stub.Generate, request, timeout_s):
            yield to_piece(response)

    def batch(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Iterator[BatchAnswer]:
        """Answers to many prompts, as they end; leaving the loop cancels them."""
        request = to_batch(prompts, params, priority)
        for response in self._stream(self._stub.GenerateBatch, request, timeout_s):
            yield to_batch_answer(response)

    def tokenize(self, prompt: Prompt, *, add_special: bool = True) -> tuple[int, ...]:
        """The token ids of a text or a chat."""
        request = pb.TokenizeRequest(prompt=to_prompt(prompt), add_special=add_special)
        return tuple(self._once(self._stub.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, keep_special: bool = False) -> str:
        """The text of tokens."""
        request = pb.DetokenizeRequest(token_ids=token_ids, keep_special=keep_special)
        return self._once(self._stub.Detokenize, request).text

    def close(self) -> None:
        """Ends the connection, and with it what runs over it."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _stream(
        self, method: Callable[..., Any], request: Any, timeout_s: float | None
    ) -> Iterator[Any]:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        attempt, has_begun = 1, False
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            call = method(request, timeout=left, metadata=self._metadata)
            try:
                for response in call:
                    has_begun = True
                    yield response
                return
            except grpc.RpcError as caught:
                self._wait_or_raise(caught, attempt, has_begun)
            finally:
                call.cancel()
            attempt += 1

    def _once(self, method: Callable[[Any], T], request: Any) -> T:
        attempt = 1
        while True:
            try:
                return method(request, metadata=self._metadata)  # type: ignore[call-arg]
            except grpc.RpcError as caught:
                self._wait_or_raise(caught, attempt, has_begun=False)
            attempt += 1

    def _wait_or_raise(self, caught: grpc.RpcError, attempt: int, has_begun: bool) -> None:
        error = to_error(caught)
        wait_s = self._retry.wait_s(error, attempt, has_begun)
        if wait_s is None:
            raise error from None
        time.sleep(wait_s)
