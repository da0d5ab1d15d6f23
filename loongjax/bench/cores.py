"""The cores that everything measured shares, whatever an engine would make of more."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def first_cores(count: int) -> Iterator[None]:
    """Keeps what is started inside on the first `count` of the cores that this process may use.

    Binds the calling thread: the threads and processes that it starts inherit that, and keep it
    afterwards. With fewer cores nothing changes. Where a system cannot bind (only Linux can), it
    warns if there are more.
    """
    if not hasattr(os, "sched_setaffinity"):
        if (cores := os.cpu_count() or 1) > count:
            _log.warning(
                "this system binds nothing to %d of %d cores: who can takes all", count, cores
            )
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
