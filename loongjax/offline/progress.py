"""How far a job is: a bar for people at a terminal, a line of log now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_TELL_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """A job at work.

    Attributes:
      done: Lines with an end, earlier runs included.
      errors: Those that are errors.
      generated_tokens: What this run has generated so far.
      degrees: Of the groups that work now; empty: not known.
    """

    done: int
    errors: int
    generated_tokens: int
    degrees: tuple[int, ...]


@runtime_checkable
class Progress(Protocol):
    """Somebody who wants to know."""

    def show(self, status: Status) -> None:
        """Is told about once a second."""
        ...


@contextmanager
def job_progress(total: int, resumed: int) -> Iterator[Progress]:
    """Whatever suits stderr, for so many lines, of which some were done before."""
    if not sys.stderr.isatty():
        yield _Log(total, resumed)
        return
    with (
        logging_redirect_tqdm(),
        tqdm(total=total, initial=resumed, unit="line", dynamic_ncols=True) as bar,
    ):
        yield _Bar(bar)


class _Rate:
    """Tokens a second since the last time."""

    def __init__(self) -> None:
        self._time, self._tokens = time.monotonic(), 0

    def update(self, tokens: int) -> float:
        now = time.monotonic()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return rate


class _Bar:
    def __init__(self, bar: tqdm) -> None:
        self._bar, self._rate = bar, _Rate()

    def show(self, status: Status) -> None:
        said = _said(self._rate.update(status.generated_tokens), status)
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(status.done - self._bar.n)
        self._bar.refresh()


class _Log:
    def __init__(self, total: int, resumed: int) -> None:
        self._total, self._resumed = total, resumed
        self._began = self._told = time.monotonic()
        self._rate = _Rate()

    def show(self, status: Status) -> None:
        now = time.monotonic()
        if now - self._told < _TELL_S:
            return
        self._told = now
        pace = (status.done - self._resumed) / (now - self._began)
        left = f"{(self._total - status.done) / pace:.0f} s left" if pace else "time left unknown"
        said = _said(self._rate.update(status.generated_tokens), status)
        _log.info("%d of %d lines, %s, %s", status.done, self._total, said, left)


def _said(rate: float, status: Status) -> str:
    parts = [f"{rate:.0f} tokens/s"]
    if status.degrees:
        parts.append(f"degrees {_counted(status.degrees)}")
    if status.errors:
        parts.append(f"{status.errors} errors")
    return ", ".join(parts)


def _counted(degrees: tuple[int, ...]) -> str:
    """`4 1x2`: one group of four instances, and two of one."""
    groups = sorted(Counter(degrees).items(), reverse=True)
    return " ".join(str(degree) + (f"x{count}" if count > 1 else "") for degree, count in groups)
