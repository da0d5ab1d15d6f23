"""An engine for asyncio servers: opens, aborts and drains requests, whatever protocol they came by.

Owns the clients' names of open requests, and whether new ones are taken. Belongs to one asyncio
loop; only the bridge is touched by the engine's thread.

Promises: a request whose reader leaves, for whatever reason, is aborted, so that its KV is free
when the step that works on it has ended; each is reported once, when it has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

from loongjax.api.build import BuiltEngine
from loongjax.engine import FinishedEvent, GenerationRequest, RequestHandle, Timings
from loongjax.errors import EngineClosedError, LoongJaxError, RequestError
from loongjax.sampling.params import SamplingParams
from serving.config import Limits
from serving.errors import DrainingError, status_of
from serving.gate import Gate, Ticket, WithdrawnError
from serving.stream import AnswerStream, Bridge, Progress
from serving.text import Prompt, encode

Protocol: TypeAlias = Literal["vllm", "grpc", "http"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a client asks for, in no protocol's words.

    Attributes:
      name: The client's name for it; free, but unique among its open requests.
      client: Who asks; see `serving.auth`.
      protocol: How it came.
      prompt: A text, token ids, or a chat.
      params: How to answer.
      priority: Higher is served earlier: in the client's own line, and by policies that look at it.
      time_left_s: When the client gives up, from now [s]; None: it does not.
    """

    name: str
    client: str
    protocol: Protocol
    prompt: Prompt
    params: SamplingParams
    priority: int = 0
    time_left_s: float | None = None


@dataclass(kw_only=True, slots=True)
class Answers:
    """An open request.

    Attributes:
      stream: What comes of it.
      ticket: Its place at the gate; None before its prompt is known.
      first_token: The first of its prompt.
      handles: Its ends in the engine, one for each answer; empty before the engine has it.
      is_unwanted: The client aborted it.
    """

    stream: AnswerStream
    ticket: Ticket | None = None
    first_token: int = 0
    handles: tuple[RequestHandle, ...] = ()
    is_unwanted: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Length of its prompt; 0 before that is known."""
        return 0 if self.ticket is None else self.ticket.prompt_tokens

    def abort(self) -> None:
        """Ends it with reason `abort`; nothing happens to what has ended."""
        if self.ticket is not None:
            self.ticket.withdraw()
        for handle in self.handles:
            handle.abort()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A request that has ended, for log and metrics.

    Attributes:
      call: What was asked.
      outcome: `stop`, `length`, `abort`; or the status of the error that ended it, in lower case.
      prompt_tokens, answer_tokens: Its tokens, those of all answers together.
      gate_s: How long it waited for its turn [s].
      total_s: From its arrival to its end [s].
      timings: The engine's, of the first answer; None: it never ended there.
      error: What the client was told; None if nothing went wrong.
    """

    call: Call
    outcome: str
    prompt_tokens: int
    answer_tokens: int
    gate_s: float
    total_s: float
    timings: Timings | None
    error: str | None


@dataclass(kw_only=True)
class Service:
    """The requests of one server.

    Attributes:
      built: The engine, its model and its tokenizer.
      model_name: What clients call the model.
      limits: What clients may have open.
      observers: Told of every request that has ended.
      is_draining: Whether new requests are refused.
      started, last_call: When the service was made, and the last request came [s, Unix time].
    """

    built: BuiltEngine
    model_name: str
    limits: Limits = field(default_factory=Limits)
    observers: tuple[Callable[[Report], None], ...] = ()
    is_draining: bool = False
    started: float = field(default_factory=time.time)
    last_call: float = 0.0

    def __post_init__(self) -> None:
        self.gate = Gate(limits=self.limits)
        self._bridge = Bridge(asyncio.get_running_loop())
        self._open: dict[tuple[str, str], Answers] = {}
        self._numbers = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open_requests(self) -> int:
        """How many requests have no end yet."""
        return len(self._open)

    @property
    def is_ready(self) -> bool:
        """Whether a new request would be taken."""
        return self.built.engine.alive and not self.is_draining

    def engine_names(self) -> set[str]:
        """What steps call the open requests, their answers, and what these share."""
        handles = [handle for answers in self._open.values() for handle in answers.handles]
        return {name for each in handles for name in (each.id, each.stem) if name is not None}

    @asynccontextmanager
    async def answer(self, call: Call) -> AsyncIterator[Answers]:
        """Opens a request for as long as the block runs; leaving it aborts what has not ended.

        Raises:
          RequestError: The engine cannot serve it, or its name is in use.
          BusyError: A limit is reached.
          DrainingError, EngineClosedError: New requests are not taken.
        """
        async with AsyncExitStack() as stack:
            deadline = self._deadline(call)
            answers = Answers(stream=AnswerStream(call.params.n))
            reported = stack.enter_context(self._reported(call, answers))
            stack.enter_context(self._named(call, answers))
            stack.enter_context(self.gate.place(call.client))
            token_ids = await self._encode(call.prompt)
            answers.ticket = Ticket(client=call.client, prompt_tokens=len(token_ids))
            answers.first_token = token_ids[0] if token_ids else 0
            asked = time.monotonic()
            try:
                await stack.enter_async_context(self.gate.turn(answers.ticket, call.priority))
                reported.gate_s = time.monotonic() - asked
                stack.callback(self._leave, answers)
                self._submit(call, token_ids, deadline, answers)
            except WithdrawnError:
                self._end_unstarted(call, answers)
            yield answers

    async def progress(self, answers: Answers) -> AsyncGenerator[Progress, None]:
        """What comes of a request, until every answer has ended.

        Raises:
          EngineClosedError: The engine died.
          DrainingError: The server ended before the request did.
          LoongJaxError: The request failed.
        """
        while pieces := await answers.stream.take():
            for piece in pieces:
                if piece.end is not None:
                    self._raise_failure(piece.end, answers)
                yield piece

    def abort(self, name: str, client: str) -> None:
        """Ends a client's request with reason `abort`; nothing happens if it has no such one."""
        answers = self._open.get((client, name))
        if answers is not None:
            answers.is_unwanted = True
            answers.abort()

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests from now on; waits for open ones, at most that long [s]."""
        self.is_draining = True
        await self.wait_until_idle(grace_s)

    def cut_off(self) -> None:
        """Ends all open requests; their readers get a DrainingError."""
        for answers in self._open.values():
            answers.abort()

    async def wait_until_idle(self, most_s: float) -> None:
        """Waits until no request is open, but no longer than that [s]."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), most_s)

    @contextmanager
    def _named(self, call: Call, answers: Answers) -> Iterator[None]:
        if self.is_draining:
            raise DrainingError("the server is about to end; send the request to another")
        key = (call.client, call.name)
        if key in self._open:
            raise RequestError(
                f"request id {call.name!r} belongs to a request that has not ended; choose another"
            )
        self.last_call = time.time()
        self._idle.clear()
        self._open[key] = answers
        try:
            yield
        finally:
            del self._open[key]
            if not self._open:
                self._idle.set()

    @contextmanager
    def _reported(self, call: Call, answers: Answers) -> Iterator[_Times]:
        times = _Times(arrival=time.monotonic())
        error: BaseException | None = None
        try:
            yield times
        except BaseException as caught:
            error = caught
            raise
        finally:
            report = _report(call, answers, times, error)
            for observe in self.observers:
                observe(report)

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        token_ids = await encode(prompt, self.built.tokenizer)
        limit = self.limits.max_prompt_tokens
        if limit is not None and len(token_ids) > limit:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and max_prompt_tokens is {limit}; "
                "shorten it"
            )
        return token_ids

    def _deadline(self, call: Call) -> float | None:
        return None if call.time_left_s is None else self.built.engine.now() + call.time_left_s

    def _submit(
        self, call: Call, token_ids: tuple[int, ...], deadline: float | None, answers: Answers
    ) -> None:
        engine = self.built.engine
        request = GenerationRequest(
            # No two are alike, though a client may choose names like the engine's for samples.
            id=f"{call.name}/{next(self._numbers)}",
            token_ids=token_ids,
            params=call.params,
            priority=call.priority,
            deadline=deadline,
        )
        send = partial(self._bridge.send, answers.stream)
        answers.handles = engine.submit_samples(request, on_event=send)
        if answers.is_unwanted:  # aborted while its text was encoded
            answers.abort()

    def _end_unstarted(self, call: Call, answers: Answers) -> None:
        now = self.built.engine.now()
        timings = Timings(arrival=now, first_scheduled=None, first_token=None, end=now)
        for sample in range(call.params.n):
            answers.stream.put(sample, FinishedEvent(reason="abort", timings=timings))

    def _raise_failure(self, end: FinishedEvent, answers: Answers) -> None:
        if end.error is not None:
            raise (LoongJaxError if self.built.engine.alive else EngineClosedError)(end.error)
        if end.reason == "abort" and not answers.is_unwanted:
            raise DrainingError("the server ended before this request did; send it to another")

    def _leave(self, answers: Answers) -> None:
        answers.abort()
        if answers.ticket is not None:
            answers.ticket.answer_tokens = answers.stream.tokens


@dataclass(kw_only=True, slots=True)
class _Times:
    arrival: float
    gate_s: float = 0.0


def _report(call: Call, answers: Answers, times: _Times, error: BaseException | None) -> Report:
    first = answers.stream.ends.get(0)
    outcome: str = first.reason if first else "abort"
    message = None
    if isinstance(error, LoongJaxError):
        status = status_of(error)
        outcome, message = status.grpc.name.lower(), status.message
    elif error is not None:
        outcome = "cancelled"
        if isinstance(error, Exception):
            outcome, message = "internal", f"{type(error).__name__}: {error}"
    return Report(
        call=call,
        outcome=outcome,
        prompt_tokens=answers.prompt_tokens,
        answer_tokens=answers.stream.tokens,
        gate_s=times.gate_s,
        total_s=time.monotonic() - times.arrival,
        timings=first.timings if first else None,
        error=message,
    )
