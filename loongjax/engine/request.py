"""One request as the loop sees it, from its arrival until its slots are free again.

Holds what was generated and where it stands; where its KV lies, only the allocator knows.
The loop alone touches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loongjax.engine.front import Submission
from loongjax.engine.handle import RequestHandle
from loongjax.engine.messages import FinishReason, RequestRecord, StopWatch, Timings
from loongjax.kvcache import BlockAllocator, Whereabouts
from loongjax.plan import RequestId, RequestView, TokenLogprobs


@dataclass(kw_only=True, slots=True)
class Request:
    """State of a request.

    Attributes:
      submission: What came in.
      stop_ids: Tokens that end it.
      id, prompt, peak: Its name and lengths, as in `RequestView`.
      watch: Looks for texts that end it; None: none does.
      next_id: The token behind the prompt, if that is a part of a longer one.
      prompt_logprobs: Of its prompt, from the second token on, as far as computed.
      generated: Tokens produced so far.
      in_flight: The newest step in flight that works on it, or None.
      last_seq: The newest step that computed for it, or None.
      is_stem: Nobody is told of it: see `loongjax.engine.forks`.
      failures: Failed steps that cost it its KV.
      ended: It has an end, though a step may still work on it.
      first_scheduled, first_token: For `Timings`.
    """

    submission: Submission
    stop_ids: frozenset[int]
    id: RequestId = field(init=False)
    prompt: int = field(init=False)
    peak: int = field(init=False)
    watch: StopWatch | None = None
    next_id: int | None = None
    is_stem: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    in_flight: int | None = None
    last_seq: int | None = None
    failures: int = 0
    ended: bool = False
    first_scheduled: float | None = None
    first_token: float | None = None
    _kv: Whereabouts | None = None
    _view: RequestView | None = None

    def __post_init__(self) -> None:
        self.id = self.submission.request.id
        self.prompt = len(self.submission.request.token_ids)
        self.peak = self.prompt + self.submission.max_tokens - 1

    @property
    def handle(self) -> RequestHandle:
        """The caller's end."""
        return self.submission.handle

    def append(self, token: int, time: float) -> FinishReason | None:
        """Takes a token that was on the host at `time`; says whether it ends the request."""
        self.generated.append(token)
        self._view = None
        if self.first_token is None:
            self.first_token = time
        if token in self.stop_ids:
            return "stop"
        if self.watch is not None:
            self.watch.push((token,))
            if self.watch.stop is not None:
                return "stop"
        return "length" if len(self.generated) == self.submission.max_tokens else None

    def launched(self, seq: int, time: float, *, computes: bool) -> None:
        """A step works on it from now on; one that computes makes it a token, or some of its KV."""
        self._view = self._kv = None
        self.in_flight = seq
        if computes:
            self.last_seq = seq
        if self.first_scheduled is None:
            self.first_scheduled = time

    def score_prompt(self, start: int, logprobs: Sequence[TokenLogprobs]) -> None:
        """Takes those of the prompt from a position on; what is computed anew is the same."""
        self.prompt_logprobs += logprobs[len(self.prompt_logprobs) + 1 - start :]

    def changed(self) -> None:
        """To be called when its KV grew or went: the view is made anew."""
        self._view = self._kv = None

    def view(self, allocator: BlockAllocator) -> RequestView:
        """What the policy sees; the same object until something changes."""
        if self._view is None:
            submission, kv = self.submission, self._kv
            if kv is None:
                kv = self._kv = allocator.whereabouts(self.id)
            computed, shares, tail, holes, shared = kv
            request = submission.request
            self._view = RequestView(
                id=self.id,
                prompt=self.prompt,
                max_tokens=submission.max_tokens,
                arrival=submission.arrival,
                computed=computed,
                generated=len(self.generated),
                kv=shares,
                tail=tail,
                holes=holes,
                shared=shared,
                deadline=request.deadline,
                priority=request.priority,
                last_seq=self.last_seq,
                first_token=self.first_token,
            )
        return self._view

    def timings(self, end: float) -> Timings:
        """When it came, ran, and ended at `end`."""
        return Timings(
            arrival=self.submission.arrival,
            first_scheduled=self.first_scheduled,
            first_token=self.first_token,
            end=end,
        )

    def record(self, reason: FinishReason, end: float) -> RequestRecord:
        """What is kept of it when it ended at `end`."""
        return RequestRecord(
            id=self.id,
            prompt=self.prompt,
            generated=len(self.generated),
            reason=reason,
            arrival=self.submission.arrival,
            first_scheduled=self.first_scheduled,
            first_token=self.first_token,
            end=end,
        )
