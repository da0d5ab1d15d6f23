"""An engine for asyncio servers: opens, aborts and drains requests, whatever protocol they came by.

Owns the clients' names of open requests, and whether new ones are taken. Belongs to one asyncio
loop; only the bridge is touched by the engine's thread.

Promises: a request whose reader leaves, for whatever reason, is aborted, so that its KV is free
when the step that works on it has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from loongjax.api.build import BuiltEngine
from loongjax.api.prompts import encode_prompt
from loongjax.engine import GenerationRequest, RequestHandle
from loongjax.errors import EngineClosedError, LoongJaxError, RequestError
from loongjax.sampling.params import SamplingParams
from serving.errors import BusyError, DrainingError
from serving.stream import AnswerStream, Bridge, Progress

_RETRY_AFTER_S = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What a client asks for, in no protocol's words.

    Attributes:
      name: The client's name for it; free, but unique among open requests.
      prompt: A text, or token ids.
      params: How to answer.
      priority: Higher is served earlier, by policies that look at it.
      time_left_s: When the client gives up, from now [s]; None: it does not.
    """

    name: str
    prompt: str | Sequence[int]
    params: SamplingParams
    priority: int = 0
    time_left_s: float | None = None


@dataclass(kw_only=True, slots=True)
class Answers:
    """An open request.

    Attributes:
      stream: What comes of it.
      prompt_tokens: Length of its prompt.
      handles: Its ends in the engine, one for each answer; empty before the engine has it.
      is_unwanted: The client aborted it.
    """

    stream: AnswerStream
    prompt_tokens: int = 0
    handles: tuple[RequestHandle, ...] = ()
    is_unwanted: bool = False

    def abort(self) -> None:
        """Ends it with reason `abort`; nothing happens to what has ended."""
        for handle in self.handles:
            handle.abort()


@dataclass(kw_only=True)
class Service:
    """The requests of one server.

    Attributes:
      built: The engine, its model and its tokenizer.
      model_name: What clients call the model.
      max_requests: Requests open at once.
      is_draining: Whether new requests are refused.
      started, last_call: When the service was made, and the last request came [s, Unix time].
    """

    built: BuiltEngine
    model_name: str
    max_requests: int
    is_draining: bool = False
    started: float = field(default_factory=time.time)
    last_call: float = 0.0

    def __post_init__(self) -> None:
        self._bridge = Bridge(asyncio.get_running_loop())
        self._open: dict[str, Answers] = {}
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

    @asynccontextmanager
    async def answer(self, call: Call) -> AsyncIterator[Answers]:
        """Opens a request for as long as the block runs; leaving it aborts what has not ended.

        Raises:
          RequestError: The engine cannot serve it, or its name is in use.
          BusyError: Too many requests are open.
          DrainingError, EngineClosedError: New requests are not taken.
        """
        answers = self._enter(call)
        try:
            await self._submit(call, answers)
            yield answers
        finally:
            answers.abort()
            del self._open[call.name]
            if not self._open:
                self._idle.set()

    async def progress(self, answers: Answers) -> AsyncIterator[Progress]:
        """What comes of a request, until every answer has ended.

        Raises:
          EngineClosedError: The engine died.
          DrainingError: The server ended before the request did.
          LoongJaxError: The request failed.
        """
        async for piece in answers.stream:
            if piece.end is not None and piece.end.error is not None:
                alive = self.built.engine.alive
                raise (LoongJaxError if alive else EngineClosedError)(piece.end.error)
            if piece.end is not None and piece.end.reason == "abort" and not answers.is_unwanted:
                raise DrainingError("the server ended before this request did; send it to another")
            yield piece

    def abort(self, name: str) -> None:
        """Ends a request with reason `abort`; nothing happens if there is none of that name."""
        answers = self._open.get(name)
        if answers is not None:
            answers.is_unwanted = True
            answers.abort()

    async def drain(self, grace_s: float) -> bool:
        """Refuses new requests and waits until the open ones have ended; says if they have."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            _log.warning("%d requests are open after %g s", self.open_requests, grace_s)
            return False
        return True

    def _enter(self, call: Call) -> Answers:
        if self.is_draining:
            raise DrainingError("the server is about to end; send the request to another")
        if call.name in self._open:
            raise RequestError(
                f"request id {call.name!r} belongs to a request that has not ended; choose another"
            )
        if len(self._open) >= self.max_requests:
            raise BusyError(
                f"{len(self._open)} requests are open, and max_requests is {self.max_requests}; "
                f"try again in {_RETRY_AFTER_S} s",
                retry_after_s=_RETRY_AFTER_S,
            )
        self.last_call = time.time()
        self._idle.clear()
        answers = self._open[call.name] = Answers(stream=AnswerStream(call.params.n))
        return answers

    async def _submit(self, call: Call, answers: Answers) -> None:
        token_ids = await self._encode(call.prompt)
        engine = self.built.engine
        request = GenerationRequest(
            # No two are alike, though a client may choose names like the engine's for samples.
            id=f"{call.name}/{next(self._numbers)}",
            token_ids=token_ids,
            params=call.params,
            priority=call.priority,
            deadline=None if call.time_left_s is None else engine.now() + call.time_left_s,
        )
        send = partial(self._bridge.send, answers.stream)
        answers.prompt_tokens = len(token_ids)
        if call.params.n > 1:
            answers.handles = engine.submit_samples(request, on_event=send)
        else:
            answers.handles = (engine.submit(request, on_event=partial(send, 0)),)
        if answers.is_unwanted:  # aborted while its text was encoded
            answers.abort()

    async def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):  # seconds for a long text: not in the loop's thread
            return await asyncio.to_thread(encode_prompt, prompt, self.built.tokenizer)
        return tuple(prompt)
