"""What `LLM` gives back, and how it is put together from a request's events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

from loongjax.api.showing import (
    answer_html,
    answer_line,
    batch_html,
    request_html,
    timeline_of,
)
from loongjax.engine import FinishReason, StepKind, StepRecord, Timings
from loongjax.plan import Group, TokenLogprobs
from loongjax.timeline import Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRun:
    """`count` successive steps of a request, all of one kind and on the same instances."""

    kind: StepKind
    instances: Group
    count: int

    @property
    def degree(self) -> int:
        """How many instances worked on it."""
        return len(self.instances)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One answer to a prompt.

    Attributes:
      index: Which of the prompt's answers it is, from 0.
      token_ids: The answer, with the token that stopped it if there is one.
      text: The answer without what stopped it (but see `include_stop_str_in_output`) and
        without the model's special tokens; None if the model has no tokenizer.
      finish_reason: `length`, `stop`, `abort` or `error`.
      stop_token: The token that stopped it, or None.
      stop_text: The text that stopped it, of `SamplingParams.stop`, or None.
      logprobs: Log-probabilities at each token; None if `SamplingParams.logprobs` is.
      error: What went wrong, or None unless `finish_reason` is `error`.
      steps: Where and how it ran, in order. Steps that failed are left out.
      records: Every step that worked on it, as far as the engine kept them.
      ttft_s: Seconds from submission to the first token, or None without one.
      decode_tokens_per_s: Tokens per second after the first, or None without any.
      timings: When it came, ran and ended; None: it was refused.
    """

    index: int = 0
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    stop_token: int | None = None
    stop_text: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None
    steps: tuple[StepRun, ...] = ()
    records: tuple[StepRecord, ...] = field(default=(), compare=False)
    ttft_s: float | None = None
    decode_tokens_per_s: float | None = None
    timings: Timings | None = None

    @property
    def stop_reason(self) -> int | str | None:
        """The text or the token that stopped it, or None."""
        return self.stop_text if self.stop_text is not None else self.stop_token

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of the whole answer; None if `logprobs` is."""
        return None if self.logprobs is None else sum(each.logprob for each in self.logprobs)

    def __repr__(self) -> str:
        return f"<CompletionOutput: {answer_line(self)}>"

    def _repr_html_(self) -> str:
        return answer_html(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """The answers to one prompt: `SamplingParams.n` of them, nearly always one.

    Attributes:
      prompt_token_ids: The prompt as the model saw it.
      outputs: All answers, by index. The first one's attributes are those of this object too.
      prompt_logprobs: Log-probabilities at each token of the prompt, None at the first; None if
        `SamplingParams.prompt_logprobs` is.
    """

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def timeline(self) -> Timeline:
        """The steps that worked on it, to be drawn or saved as a trace."""
        return timeline_of(self.outputs)

    def __repr__(self) -> str:
        return f"<RequestOutput: {' | '.join(map(answer_line, self.outputs))}>"

    def _repr_html_(self) -> str:
        return request_html(self)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """See `CompletionOutput`, as for all below."""
        return self.outputs[0].token_ids

    @property
    def text(self) -> str | None:
        """The first answer's."""
        return self.outputs[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """The first answer's."""
        return self.outputs[0].finish_reason

    @property
    def stop_token(self) -> int | None:
        """The first answer's."""
        return self.outputs[0].stop_token

    @property
    def stop_text(self) -> str | None:
        """The first answer's."""
        return self.outputs[0].stop_text

    @property
    def stop_reason(self) -> int | str | None:
        """The first answer's."""
        return self.outputs[0].stop_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """The first answer's."""
        return self.outputs[0].logprobs

    @property
    def error(self) -> str | None:
        """The first answer's."""
        return self.outputs[0].error

    @property
    def steps(self) -> tuple[StepRun, ...]:
        """The first answer's."""
        return self.outputs[0].steps

    @property
    def ttft_s(self) -> float | None:
        """The first answer's."""
        return self.outputs[0].ttft_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """The first answer's."""
        return self.outputs[0].decode_tokens_per_s


class RequestOutputs(list[RequestOutput]):
    """The outputs of a batch: a list that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return batch_html(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamChunk:
    """A piece of an answer. The chunks' texts joined are the text of the answer.

    Attributes:
      text: What is new and final, often empty; None if the model has no tokenizer.
      token_ids: The new tokens; empty in the last chunk.
      logprobs: Log-probabilities at each, if they were asked for; else empty.
      finish_reason: Set in the last chunk alone.
    """

    text: str | None
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None


def step_runs(records: Iterable[StepRecord]) -> tuple[StepRun, ...]:
    """Run-length summary of a request's steps, failed ones left out."""
    done = (record for record in records if record.error is None)
    return tuple(
        StepRun(kind=kind, instances=group, count=sum(1 for _ in run))
        for (kind, group), run in groupby(done, key=lambda record: (record.kind, record.group))
    )


def ttft_s(timings: Timings) -> float | None:
    """Seconds from submission to the first token."""
    return None if timings.first_token is None else timings.first_token - timings.arrival


def decode_rate(timings: Timings, tokens: int) -> float | None:
    """Tokens per second after the first."""
    if timings.first_token is None or tokens < 2 or timings.end <= timings.first_token:
        return None
    return (tokens - 1) / (timings.end - timings.first_token)
