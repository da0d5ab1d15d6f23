"""How requests end: what their callers are told, and what is given back.

Owns the outbox: tokens and ends on their way to handles, which wait there while new steps are
submitted. A request that ended keeps its slots until no step in flight works on it any more,
and its name until then.
Not here: when and why one ends (`loongjax.engine.loop` decides).
"""

from __future__ import annotations

from loongjax.engine.forks import Forks
from loongjax.engine.front import Door
from loongjax.engine.handle import RequestHandle
from loongjax.engine.history import History
from loongjax.engine.messages import Event, FinishedEvent, FinishReason
from loongjax.engine.request import Request
from loongjax.engine.state import State
from loongjax.executor.protocol import Executor


class Ends:
    """Ends requests; the loop alone touches it.

    Attributes:
      outbox: What is to be delivered, in order; any event of an open request may be added.
    """

    def __init__(
        self, *, executor: Executor, state: State, front: Door, history: History, forks: Forks
    ) -> None:
        self._executor = executor
        self._state = state
        self._front = front
        self._history = history
        self._forks = forks
        self.outbox: list[tuple[RequestHandle, Event]] = []

    def end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        time: float,
        error: str | None = None,
        stop_token: int | None = None,
    ) -> None:
        """Ends an open request; a stem with all samples that wait for it."""
        if request.is_stem:
            for sample in self._forks.take(request):
                self.end_sample(sample, reason, time=time, error=error)
        else:
            self.announce(request, reason, time=time, error=error, stop_token=stop_token)
        self.close(request)

    def end_sample(
        self, sample: Request, reason: FinishReason, *, time: float, error: str | None = None
    ) -> None:
        """Ends a sample that waits for its stem: nobody else knows it yet."""
        self.announce(sample, reason, time=time, error=error)
        self._front.retire(sample.id)

    def announce(
        self,
        request: Request,
        reason: FinishReason,
        *,
        time: float,
        error: str | None = None,
        stop_token: int | None = None,
    ) -> None:
        """Says that a request has ended, and nothing else."""
        event = FinishedEvent(
            reason=reason,
            error=error,
            stop_token=stop_token,
            stop_text=None if request.watch is None else request.watch.stop,
            timings=request.timings(time),
        )
        self.outbox.append((request.handle, event))
        self._history.add_end(request.record(reason, time), reason)

    def close(self, request: Request) -> None:
        """Frees what a request has, now or when the step that works on it has ended."""
        if request.is_stem:
            self._history.forget(request.id)
        if self._state.end(request):
            self.forget(request)

    def forget(self, request: Request) -> None:
        """Frees what a request has, which has ended and on which no step works."""
        self._state.release_kv(request)
        self._executor.forget(request.id)
        self._front.retire(request.id)

    def deliver(self) -> None:
        """Hands out what is in the outbox."""
        outbox, self.outbox = self.outbox, []
        for handle, event in outbox:
            handle.deliver(event)
