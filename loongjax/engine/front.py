"""The thread-safe door of the engine: what callers hand in, until the loop takes it.

Owns the inbox and the set of ids in use, under one lock. Checks requests in the caller's
thread, so that the loop never meets one that cannot be served. Never calls the loop, the
policy or a device; the executor's `wake` and clock are all it touches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

from loongjax.engine.admission import Admission
from loongjax.engine.handle import OnEvent, OnSampleEvent, RequestHandle
from loongjax.engine.messages import GenerationRequest
from loongjax.errors import EngineClosedError, RequestError
from loongjax.plan import InstanceId, RequestId
from loongjax.scheduler.policy import Policy


def sample_id(request: RequestId, sample: int) -> RequestId:
    """The name of one of the answers to a request."""
    return f"{request}#{sample}" if sample else request


def stem_id(request: RequestId) -> RequestId:
    """The name of what the answers to a request share."""
    return f"{request}#stem"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A checked request. `max_tokens` is resolved: never None, and within all limits."""

    request: GenerationRequest
    handle: RequestHandle
    max_tokens: int
    arrival: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort:
    """A wish to end the request of this handle; its id may be another's by now."""

    handle: RequestHandle


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Several answers to one prompt; `stem` is a free name for what they share."""

    stem: RequestId
    submissions: tuple[Submission, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drain:
    """A wish that an instance runs empty, or takes KV again."""

    instance: InstanceId
    draining: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangePolicy:
    """A wish to plan by another policy."""

    policy: Policy


Input: TypeAlias = Submission | Samples | Abort | Drain | ChangePolicy


@runtime_checkable
class Door(Protocol):
    """The loop's side of a front: where requests come from, be they real or simulated."""

    @property
    def closing(self) -> bool:
        """Whether the loop should end."""
        ...

    @property
    def has_input(self) -> bool:
        """Whether something came since `take`."""
        ...

    def take(self) -> list[Input]:
        """Everything that came since the last call, in order of arrival."""
        ...

    def retire(self, request: RequestId) -> None:
        """A request has ended, and no step works on it any more."""
        ...

    def shut(self, reason: str) -> list[Input]:
        """The loop ended, naming `reason`; gives what was still queued."""
        ...


class Front:
    """Inbox of the loop. `submit`, `abort` and `request_close` may come from any thread."""

    def __init__(
        self, *, admission: Admission, now: Callable[[], float], wake: Callable[[], None]
    ) -> None:
        self._admission = admission
        self._now = now
        self._wake = wake
        self._lock = threading.Lock()
        self._inbox: list[Input] = []
        self._live: dict[RequestId, RequestHandle] = {}
        self._closing = False
        self._shut: str | None = None

    @property
    def closing(self) -> bool:
        """Whether the loop should end."""
        return self._closing

    @property
    def has_input(self) -> bool:
        """Whether something came since `take`."""
        return bool(self._inbox)

    def submit(self, request: GenerationRequest, on_event: OnEvent | None) -> RequestHandle:
        """Queues a request; see `Engine.submit`."""
        if request.params.n > 1:
            raise RequestError(
                f"request {request.id!r} asks for n = {request.params.n} answers, but submit gives "
                "one handle; call submit_samples"
            )
        max_tokens = self._admission.check(request)
        handle = RequestHandle(request.id, self._abort, on_event)
        with self._lock:
            self._reserve({request.id: handle})
            self._inbox.append(  # stamped under the lock: inbox order is arrival order
                Submission(
                    request=request, handle=handle, max_tokens=max_tokens, arrival=self._now()
                )
            )
            self._wake()
        return handle

    def submit_samples(
        self, request: GenerationRequest, on_event: OnSampleEvent | None
    ) -> tuple[RequestHandle, ...]:
        """Queues a request for `n` answers; see `Engine.submit_samples`."""
        if request.params.n == 1:
            return (self.submit(request, on_event and partial(on_event, 0)),)
        max_tokens = self._admission.check(request)
        params = replace(request.params, n=1)
        names = [sample_id(request.id, i) for i in range(request.params.n)]
        stem = stem_id(request.id)
        handles = [
            RequestHandle(name, self._abort, on_event and partial(on_event, i), stem=stem)
            for i, name in enumerate(names)
        ]
        with self._lock:
            mute = RequestHandle(stem, lambda handle: None)
            self._reserve({**dict(zip(names, handles, strict=True)), stem: mute})
            now = self._now()
            submissions = [
                Submission(
                    request=replace(request, id=name, params=params, sample=i),
                    handle=handle,
                    max_tokens=max_tokens,
                    arrival=now,
                )
                for i, (name, handle) in enumerate(zip(names, handles, strict=True))
            ]
            self._inbox.append(Samples(stem=stem, submissions=tuple(submissions)))
            self._wake()
        return tuple(handles)

    def abort(self, request: RequestId) -> None:
        """Queues an abort; nothing happens if the request or the engine has ended."""
        with self._lock:
            handle = self._live.get(request)
        if handle is not None:
            self._abort(handle)

    def steer(self, wish: Drain | ChangePolicy) -> None:
        """Queues a wish that concerns no request.

        Raises:
          EngineClosedError: The engine was closed, or died.
        """
        with self._lock:
            self._check_open()
            self._inbox.append(wish)
            self._wake()

    def request_close(self) -> None:
        """Lets the loop end after what it does now; further submissions are refused."""
        with self._lock:
            if self._shut is None and not self._closing:
                self._closing = True
                self._wake()

    def take(self) -> list[Input]:
        """Everything that came since the last call, in order of arrival. The loop's call."""
        with self._lock:
            taken, self._inbox = self._inbox, []
        return taken

    def retire(self, request: RequestId) -> None:
        """Makes an id free for another request. The loop's call."""
        with self._lock:
            self._live.pop(request, None)

    def shut(self, reason: str) -> list[Input]:
        """Refuses everything from now on, naming `reason`; gives what was still queued."""
        with self._lock:
            self._shut = reason
            left, self._inbox = self._inbox, []
        return left

    def _abort(self, handle: RequestHandle) -> None:
        with self._lock:
            if self._shut is None:
                self._inbox.append(Abort(handle=handle))
                self._wake()

    def _reserve(self, handles: Mapping[RequestId, RequestHandle]) -> None:
        """Takes all names, or none."""
        self._check_open()
        for name in handles:
            if name in self._live:
                raise RequestError(
                    f"request id {name!r} is in use; an id is free again when its request "
                    "has ended and no step works on it any more. Choose another"
                )
        self._live.update(handles)

    def _check_open(self) -> None:
        if self._shut is not None:
            raise EngineClosedError(self._shut)
        if self._closing:
            raise EngineClosedError("the engine is closing; create another one")
