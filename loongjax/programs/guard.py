"""Nothing compiles after warm-up: counts what does all the same, and says what it was.

jax tells its monitoring listeners of every compilation, in the thread that waits for it. So
this sees all of them, also those that jax makes by itself for an operation on arrays, and
none that other threads of the process wait for, such as another engine's warm-up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from loongjax.errors import StepError

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_log = logging.getLogger(__name__)


class CompileGuard:
    """Watches the compilations of one engine.

    Attributes:
      armed: Whether warm-up is over; before that nothing is counted or refused.
      strict: Whether a program that is not there is refused instead of compiled.
      compiled: Compilations that were watched while armed.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.armed = False
        self.strict = strict
        self.compiled = 0

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Counts what this thread compiles inside; `what` stands in the log. May be nested."""
        outer = _watching.by
        _watching.by = (self, what)
        try:
            yield
        finally:
            _watching.by = outer

    def refuse(self, name: str) -> None:
        """Raises StepError where program `name` must not be compiled any more."""
        if self.armed and self.strict:
            raise StepError(
                f"program {name} would have to be compiled after warm-up, which strict_programs "
                "forbids"
            )

    def note(self, what: str, function: str, seconds: float) -> None:
        """Counts one compilation, if armed."""
        if self.armed:
            self.compiled += 1
            _log.warning(
                "compiled %s for %s after warm-up, in %.2f s; requests waited for it",
                *(function, what, seconds),
            )


class _Watching(threading.local):
    """Who watches this thread, and for what."""

    by: tuple[CompileGuard, str] | None = None


_watching = _Watching()


def _on_duration(event: str, seconds: float, **details: str | int) -> None:
    if event == _COMPILE_EVENT and _watching.by is not None:
        guard, what = _watching.by
        guard.note(what, str(details.get("fun_name", "a function")), seconds)


jax.monitoring.register_event_duration_secs_listener(_on_duration)
