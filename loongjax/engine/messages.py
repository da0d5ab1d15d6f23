"""What goes into the engine and what comes out: requests, events, records, statistics.

All of it is frozen, so that it may be handed between threads without a lock. Times are
seconds of the engine's clock (`Engine.now`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from loongjax.executor.host_time import PhaseTime
from loongjax.plan import Group, InstanceId, RequestId, Share, TokenLogprobs
from loongjax.programs.counts import ProgramCounts
from loongjax.sampling.params import SamplingParams

FinishReason: TypeAlias = Literal["length", "stop", "abort", "error"]
StepKind: TypeAlias = Literal["prefill", "decode", "migrate"]


TokenMask: TypeAlias = Callable[[Sequence[int]], np.ndarray]
"""Says, of the tokens generated so far, which may come next: bool [vocabulary], not all False. For
constrained output. A function of its argument alone, called on the engine's thread once for each
token, so it must be quick; if it raises, its request ends with that error. The request's steps
wait for each other: none is queued before the last one's token is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """A prompt and how to go on from it.

    Attributes:
      id: Unique among the requests whose KV the engine still holds.
      token_ids: The prompt, at least one token; a simulator, which knows no words, gives a range.
      params: How tokens are chosen, and when to stop.
      sample: Which of the answers to its prompt this is (`SamplingParams.n`); a part of the key
        of its random draws. `Engine.submit_samples` sets it.
      mask: Which tokens may come next, or None: all that `params` let.
      priority: Higher is served earlier, by policies that look at it.
      deadline: When it should end [s, engine clock]; policies may use it, the engine does
        not abort for it.
    """

    id: RequestId
    token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    sample: int = 0
    mask: TokenMask | None = None
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """When things happened to a request [s, engine clock]; None: it never came to that."""

    arrival: float
    first_scheduled: float | None
    first_token: float | None
    end: float


@runtime_checkable
class StopWatch(Protocol):
    """Reads one answer and says when a text has ended it: the engine itself knows no text."""

    @property
    def stop(self) -> str | None:
        """The text that ended it, or None."""
        ...

    def push(self, token_ids: Sequence[int], /) -> object:
        """Takes the next tokens."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensEvent:
    """Tokens that were generated since the last event, in order; never empty.

    Attributes:
      token_ids: The tokens.
      stopped: The last of them ended the answer: it is no part of its text.
      logprobs: One for each, if the request asked for them; else empty.
      prompt_logprobs: For each token of the prompt but the first, with the first event of a
        request that asked for them; else empty.
    """

    token_ids: tuple[int, ...]
    stopped: bool = False
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedEvent:
    """The last event of a request.

    Attributes:
      reason: `stop`: a token of the model's or the request's, or a text, ended it; `length`:
        `max_tokens` were generated; `abort`: the caller or the engine's closing ended it;
        `error`: see `error`.
      error: What went wrong and what to do; None unless `reason` is `error`.
      stop_token: The token that ended it, already handed out, or None.
      stop_text: The text that ended it (`SamplingParams.stop`), or None.
      timings: When it came, ran and ended.
    """

    reason: FinishReason
    error: str | None = None
    stop_token: int | None = None
    stop_text: str | None = None
    timings: Timings


Event: TypeAlias = TokensEvent | FinishedEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """A step that ended, for timelines and for looking into what a request lived through.

    Attributes:
      seq: The step's number; ascending, but steps of disjoint groups may end in any order.
      group: The instances that ran it; its length is the degree.
      requests: The requests it worked on, in the step's order.
      tokens: Tokens that went in: of all chunks, one for each row, or those that moved.
      kept: KV tokens that it stored on each instance, or that arrived there; instances without
        any are left out.
      masters: The master of each row of a decode step, in order; empty for others.
      started, ended: When it was launched, and when its tokens were on the host.
      error: Why it failed, or None.
    """

    seq: int
    kind: StepKind
    group: Group
    requests: tuple[RequestId, ...]
    tokens: int
    kept: tuple[Share, ...]
    masters: tuple[InstanceId, ...] = ()
    started: float
    ended: float
    error: str | None = None

    @property
    def degree(self) -> int:
        """How many instances ran it."""
        return len(self.group)


class Decision(NamedTuple):
    """From `time` [s, engine clock] on, this was why a request ran where it did, or waited."""

    time: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """A request that ended, or one that is open still, for timelines.

    Attributes:
      id: Its name; a later request may have the same.
      prompt, generated: Its tokens, as far as known.
      reason: Why it ended; None while it is open.
      arrival, end: When it came and ended [s, engine clock]; `end` None while it is open.
      first_scheduled, first_token: When it first ran and first said something; None: it never
        came to that, or it is open still.
      decisions: What its policy said of it, by time; the latest of many.
    """

    id: RequestId
    prompt: int
    generated: int
    reason: FinishReason | None = None
    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    end: float | None = None
    decisions: tuple[Decision, ...] = ()


class PoolSample(NamedTuple):
    """From `time` [s, engine clock] on, `used` slots of an instance lie in held blocks."""

    time: float
    instance: InstanceId
    used: int


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceStats:
    """The pool of one instance: `used` of `slots` lie in blocks that a request holds.

    While it is `draining` no further block of it is taken.
    """

    id: InstanceId
    slots: int
    used: int
    busy: bool
    draining: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCount:
    """How many steps of a kind and degree ended without an error."""

    kind: StepKind
    degree: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine as it was a moment ago, and what it did since it started.

    Attributes:
      alive: Whether it takes requests.
      waiting: Requests whose known tokens have no KV yet.
      running: Requests that decode.
      instances: Use of every instance's pool.
      steps: Steps that succeeded, by kind and degree.
      prompt_tokens: Tokens that prefill steps computed; recomputed ones count again.
      generated_tokens: Tokens handed out.
      preemptions: How often a request's KV was dropped to make room.
      failed_steps: Steps that ended with an error.
      recomputed_requests: How often a request lost its KV to a failed step and was requeued.
      finished: Ended requests as (reason, count), by reason.
      programs: How the executor's programs came to be.
      host: Where the engine's thread spent its time.
    """

    alive: bool
    waiting: int
    running: int
    instances: tuple[InstanceStats, ...]
    steps: tuple[StepCount, ...]
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    failed_steps: int
    recomputed_requests: int
    finished: tuple[tuple[FinishReason, int], ...]
    programs: ProgramCounts
    host: tuple[PhaseTime, ...]

    @property
    def attention_backend(self) -> str | None:
        """Which kernels run; None where none do, in a simulation."""
        return self.programs.attention_backend
