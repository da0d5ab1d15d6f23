"""The caller's end of a request: its events, and a way to abort it.

The engine's loop puts events in; any thread takes them out, or a callback gets them. A
handle knows nothing of scheduling.
"""

from __future__ import annotations

import contextlib
import logging
import queue
from collections.abc import Callable, Iterator
from typing import TypeAlias

from loongjax.engine.messages import Event, FinishedEvent
from loongjax.errors import RequestError
from loongjax.plan import RequestId

_INTERRUPT_S = 0.5
"""How often a wait without limit looks up: a signal that comes just before Python blocks on
a lock does not end the wait, so Ctrl-C would go unheard until the next event."""

_log = logging.getLogger(__name__)

OnEvent: TypeAlias = Callable[[Event], object]
"""Called on the engine's loop thread, so it must return at once and never wait (from
asyncio: `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`). If it raises,
the request is aborted and it is not called again."""

OnSampleEvent: TypeAlias = Callable[[int, Event], object]
"""`OnEvent` for several answers: it is told first whose event it is, counted from 0."""


class RequestHandle:
    """Events of one request. Every method may be called from any thread.

    Attributes:
      id: The request's name.
      stem: The name under which the steps stand that computed its prompt for it and others
        (`Engine.submit_samples`); None if it shares nothing.
    """

    def __init__(
        self,
        request_id: RequestId,
        abort: Callable[[RequestHandle], None],
        on_event: OnEvent | None = None,
        *,
        stem: RequestId | None = None,
    ) -> None:
        self.id = request_id
        self.stem = stem
        self._abort = abort
        self._on_event = on_event
        self._muted = False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def get(self, timeout: float | None = None) -> Event:
        """Waits for the next event, at most `timeout` seconds (None: without limit).

        After the end it gives the `FinishedEvent` again, to every caller.

        Raises:
          TimeoutError: None came in time; the request goes on.
          RequestError: The events go to the callback given at `submit`.
        """
        if self._on_event is not None:
            raise RequestError(
                f"events of request {self.id!r} go to its on_event callback; submit it "
                "without on_event to take them from the handle"
            )
        event = self._wait() if timeout is None else self._wait_at_most(timeout)
        if isinstance(event, FinishedEvent):
            self._events.put(event)  # nobody who asks again, or in another thread, may hang
        return event

    def __iter__(self) -> Iterator[Event]:
        """Every event as it comes, the `FinishedEvent` last."""
        while True:
            event = self.get()
            yield event
            if isinstance(event, FinishedEvent):
                return

    def abort(self) -> None:
        """Ends the request with reason `abort`; nothing happens if it has ended."""
        self._abort(self)

    def deliver(self, event: Event) -> None:
        """Hands an event out. Only the engine's loop calls it; never raises."""
        if self._on_event is None:
            self._events.put(event)
        elif not self._muted:
            try:
                self._on_event(event)
            except Exception:
                _log.exception("on_event of request %r failed; the request is aborted", self.id)
                self._muted = True
                self.abort()

    def _wait(self) -> Event:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=_INTERRUPT_S)

    def _wait_at_most(self, timeout: float) -> Event:
        try:
            return self._events.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(
                f"request {self.id!r} had no event within {timeout} s; it goes on"
            ) from None
