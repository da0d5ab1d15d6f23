"""The sampling tables of a step's rows: gathered for the devices, and what was said since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32

from loongjax.executor.token_log import TokenLog
from loongjax.sampling.fields import RECENT


class NotedRows:
    """Rows that have a table, of steps that have the same rows.

    Tables are large, so they are not sent with every step: a step adds the tokens that were
    generated since they were (`loongjax.sampling.fields`).
    """

    def __init__(self, rows: Sequence[tuple[TokenLog, int]]) -> None:
        """`rows` are those of a step, with their places among all rows of its group."""
        self._rows = [(log, place) for log, place in rows if log.table is not None]
        self._known = [-1 - RECENT] * len(self._rows)  # tokens that were in the tables when sent
        self._revisions = [0] * len(self._rows)

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def is_stale(self) -> bool:
        """Whether the tables have to be gathered before the next step."""
        sent = zip(self._rows, self._known, self._revisions, strict=True)
        return any(
            len(log) - known > RECENT or log.revision != revision
            for (log, _), known, revision in sent
        )

    def gather(self, rows: int, vocab_size: int) -> Int32[np.ndarray, "A 2 V"]:
        """The tables as they are now, and zeros for rows that have none."""
        tables = np.zeros((rows, 2, vocab_size), np.int32)
        for log, place in self._rows:
            assert log.table is not None
            tables[place] = log.table.array
        self._known = [len(log) for log, _ in self._rows]
        self._revisions = [log.revision for log, _ in self._rows]
        return tables

    def recent(self) -> Iterator[tuple[int, Int32[np.ndarray, " T"]]]:
        """Places, and the tokens that their tables lack."""
        for (log, place), known in zip(self._rows, self._known, strict=True):
            yield place, log.every(1, known, len(log))
