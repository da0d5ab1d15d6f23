"""A request that was submitted, as its caller holds it: to wait for, to read, to abort."""

from __future__ import annotations

import time
from collections.abc import Iterator

from loongjax.api.answers import AnswerBuilder
from loongjax.api.outputs import CompletionOutput, RequestOutput, StreamChunk
from loongjax.engine import Engine, GenerationRequest, RequestHandle
from loongjax.errors import EngineClosedError, LoongJaxError, RequestError
from loongjax.plan import RequestId, TokenLogprobs
from loongjax.sampling.params import SamplingParams
from loongjax.text import Tokenizer


def check_stream(params: SamplingParams) -> None:
    """Raises RequestError for what cannot be streamed."""
    if params.n > 1:
        raise RequestError(
            f"a stream is one answer, but n = {params.n}; open n streams with seeds of their own, "
            "or call generate"
        )


class PendingRequest:
    """A request that runs, or has ended. One thread reads it; any thread may abort it.

    Attributes:
      prompt_token_ids: Its prompt.
      params: How it is answered.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        name: RequestId,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        priority: int = 0,
    ) -> None:
        """Submits it. Raises as `Engine.submit`."""
        self.prompt_token_ids = token_ids
        self.params = params
        self._engine = engine
        request = GenerationRequest(id=name, token_ids=token_ids, params=params, priority=priority)
        self._handles = engine.submit_samples(request)
        self._builders = [AnswerBuilder(i, tokenizer, params) for i in range(params.n)]

    @property
    def id(self) -> RequestId:
        """Its name in the engine's records."""
        return self._handles[0].id

    def abort(self) -> None:
        """Ends it with reason `abort`; nothing happens if it has ended."""
        for handle in self._handles:
            handle.abort()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits for its end; what went wrong while it ran stands in its answers.

        Raises:
          TimeoutError: It has not ended in so many seconds; it goes on, and may be asked again.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        answers = tuple(
            self._finish(handle, builder, deadline)
            for handle, builder in zip(self._handles, self._builders, strict=True)
        )
        return RequestOutput(
            prompt_token_ids=self.prompt_token_ids,
            outputs=answers,
            prompt_logprobs=self._prompt_logprobs(),
        )

    def stream(self) -> Iterator[StreamChunk]:
        """Its answer piece by piece, from where it was read last.

        Raises:
          RequestError: It has several answers.
          EngineClosedError, LoongJaxError: It failed.
        """
        check_stream(self.params)
        (builder,), (handle,) = self._builders, self._handles
        while builder.end is None:
            chunk = builder.add(handle.get())
            if builder.end is not None:
                self.raise_error(builder.end.error)
            yield chunk

    def raise_error(self, error: str | None) -> None:
        """Raises what went wrong with it, if anything did."""
        if error is not None:
            raise LoongJaxError(error) if self._engine.alive else EngineClosedError(error)

    def _finish(
        self, handle: RequestHandle, builder: AnswerBuilder, deadline: float | None
    ) -> CompletionOutput:
        while builder.end is None:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            builder.add(handle.get(left))
        shared = () if handle.stem is None else self._engine.steps_of(handle.stem)
        return builder.build(builder.end, (*shared, *self._engine.steps_of(handle.id)))

    def _prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        if self.params.prompt_logprobs is None:
            return None
        return (None, *self._builders[0].prompt_logprobs)
