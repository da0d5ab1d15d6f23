"""A progress bar on stderr for people at a terminal; silence elsewhere, where the log tells."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(
    title: str, unit: str = "program", *, shown: bool = True
) -> Iterator[Callable[[int, int, str], None]]:
    """Gives a function to call with what is done, of how much, and a remark.

    Log lines that are written meanwhile stand above the bar. `shown` False: there is no bar.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    # Imported late: it warns of missing widgets in every notebook, where there is no bar.
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm(), tqdm(desc=title, unit=unit, leave=False) as bar:

        def show(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        yield show
