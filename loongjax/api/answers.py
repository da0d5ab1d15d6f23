"""Answers put together from a request's events: whole, or piece by piece."""

from __future__ import annotations

from collections.abc import Iterable

from loongjax.api.outputs import (
    CompletionOutput,
    RequestOutput,
    StreamChunk,
    decode_rate,
    step_runs,
    ttft_s,
)
from loongjax.engine import Event, FinishedEvent, StepRecord
from loongjax.plan import TokenLogprobs
from loongjax.sampling.params import SamplingParams
from loongjax.text import AnswerText, Tokenizer


class AnswerBuilder:
    """One answer, from its events.

    Attributes:
      end: Its last event, once that came.
      prompt_logprobs: Of its prompt, as `TokensEvent` has them.
    """

    def __init__(self, index: int, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self.end: FinishedEvent | None = None
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._index = index
        self._text = None if tokenizer is None else AnswerText(tokenizer, params)
        self._said: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []

    def add(self, event: Event) -> StreamChunk:
        """Takes the next event; returns what is new."""
        if isinstance(event, FinishedEvent):
            self.end = event
            rest = None if self._text is None else self._text.flush()
            self._said.append(rest or "")
            return StreamChunk(text=rest, token_ids=(), finish_reason=event.reason)
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs
        self._token_ids += event.token_ids
        if self._logprobs is not None:
            self._logprobs += event.logprobs
        piece = None
        if self._text is not None:
            piece = self._text.push(event.token_ids, stopped=event.stopped)
            self._said.append(piece)
        return StreamChunk(text=piece, token_ids=event.token_ids, logprobs=event.logprobs)

    def build(self, end: FinishedEvent, steps: Iterable[StepRecord]) -> CompletionOutput:
        """The answer, which has ended; `steps` are those that worked on it."""
        records = tuple(steps)
        return CompletionOutput(
            index=self._index,
            token_ids=tuple(self._token_ids),
            text=None if self._text is None else "".join(self._said),
            finish_reason=end.reason,
            stop_token=end.stop_token,
            stop_text=end.stop_text,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            error=end.error,
            steps=step_runs(records),
            records=records,
            ttft_s=ttft_s(end.timings),
            decode_tokens_per_s=decode_rate(end.timings, len(self._token_ids)),
            timings=end.timings,
        )


def refused(token_ids: tuple[int, ...], tokenizer: Tokenizer | None, error: str) -> RequestOutput:
    """What there is to say of a prompt that was not taken."""
    answer = CompletionOutput(
        token_ids=(),
        text=None if tokenizer is None else "",
        finish_reason="error",
        error=error,
    )
    return RequestOutput(prompt_token_ids=token_ids, outputs=(answer,))
