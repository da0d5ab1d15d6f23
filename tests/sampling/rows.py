"""Rows for the sampling function, made of `SamplingParams` as the executor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from loongjax.executor.protocol import RequestInput
from loongjax.executor.token_log import TokenLog
from loongjax.plan import TokenLogprobs
from loongjax.sampling.device import Rows, sample, shape
from loongjax.sampling.fields import FIELDS, FLOATS, NO_TOKEN
from loongjax.sampling.params import SamplingParams
from loongjax.sampling.told import token_logprobs

choose = jax.jit(lambda logits, rows, tables: sample(logits, rows, lambda: tables))
shape_rows = jax.jit(shape)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A request in the middle of its answer.

    Attributes:
      late: How many of the newest tokens its table lacks when the program runs.
    """

    params: SamplingParams
    prompt: tuple[int, ...] = (0,)
    answer: tuple[int, ...] = ()
    end_ids: frozenset[int] = frozenset()
    seed: int = 0
    number: int = 0
    late: int = 0


def inputs(rows: Sequence[Row], vocab: int) -> tuple[Rows, np.ndarray]:
    """What the program is told of some rows, and their tables."""
    fields, tables, added = [], [], []
    for row in rows:
        request = RequestInput(
            id="r",
            token_ids=row.prompt,
            params=row.params,
            seed=row.seed,
            sample=row.number,
            end_ids=row.end_ids,
        )
        log, noted = TokenLog(request, vocab), len(row.answer) - row.late
        for token in row.answer[:noted]:
            log.append(token)
        fields.append([log.fields[name] for name in FIELDS])
        tables.append(np.zeros((2, vocab), np.int32) if log.table is None else log.table.array)
        added.append([*row.answer[noted:], *[NO_TOKEN] * (8 - row.late)])
    columns = dict(zip(FIELDS, np.array(fields, np.int32).T, strict=True))
    for name in FLOATS:
        columns[name] = np.ascontiguousarray(columns[name]).view(np.float32)
    position = np.array([len(row.prompt) + len(row.answer) for row in rows], np.int32)
    told = Rows(**columns, position=position, added=np.array(added, np.int32))
    return told, np.array(tables)


def drawn(logits: np.ndarray, row: Row, **columns: object) -> np.ndarray:
    """The tokens of many rows that differ from one in a few columns of `Rows` alone."""
    told, tables = inputs([row], logits.shape[1])
    own = {
        name: np.broadcast_to(np.asarray(value, getattr(told, name).dtype), len(logits))
        for name, value in columns.items()
    }
    told = Rows(*(np.repeat(column, len(logits), 0) for column in told))._replace(**own)
    return np.asarray(choose(logits, told, np.repeat(tables, len(logits), 0)))[:, 0]


def said(logits: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """What the program says of each row's token."""
    return np.asarray(choose(logits, *inputs(rows, logits.shape[1])))


def shaped(logits: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """Logits with bias, penalties and forbidden tokens."""
    return np.asarray(shape_rows(logits, *inputs(rows, logits.shape[1])))


def tokens(logits: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """The token of each row."""
    return said(logits, rows)[:, 0]


def logprobs(logits: np.ndarray, rows: Sequence[Row], top: int) -> list[TokenLogprobs]:
    """Log-probabilities of each row's token."""
    return token_logprobs(said(logits, rows), top)
