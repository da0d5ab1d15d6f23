"""The small inputs of a program: what the host tells each rank about a step.

Both sides read the same layout: the host fills numpy views (`loongjax.executor.inputs`), the
program slices the same places.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Array, Int32

from loongjax.sampling.fields import FIELDS, RECENT

Kind: TypeAlias = Literal["prefill", "extend", "decode", "migrate"]

_Vector = TypeVar("_Vector", np.ndarray, Array)

_CHUNK_FIELDS = ("chunk_begin", "chunk_end", "chunk_start", "history_start", "history_entries")


class MetaLayout:
    """Names and places of a step's small inputs in one int32 vector for each rank.

    A transfer to a device costs much more than its bytes, so a step makes one. Both sides
    read this: the host fills numpy views, the program slices the same places.
    """

    def __init__(self, fields: Mapping[str, tuple[int, ...]]) -> None:
        self._places: dict[str, tuple[slice, tuple[int, ...]]] = {}
        self.size = 0
        for name, shape in fields.items():
            end = self.size + prod(shape)
            self._places[name] = slice(self.size, end), shape
            self.size = end

    def views(self, vector: _Vector) -> dict[str, _Vector]:
        """The fields of one rank's vector; views of it in numpy, slices under jax."""
        return {name: vector[at].reshape(shape) for name, (at, shape) in self._places.items()}

    def of_all_ranks(self, vectors: np.ndarray, name: str) -> np.ndarray:
        """One field of all ranks, `[n, ...]`; a view of their vectors `[n, size]`."""
        at, shape = self._places[name]
        return vectors[:, at].reshape(len(vectors), *shape)


Meta: TypeAlias = Mapping[str, Int32[Array, "..."]]


@cache
def meta_layout(kind: Kind, n: int, size: int, rows: int) -> MetaLayout:
    """The inputs of one rank of a program of degree n; `size` is its bucket.

    Of both kinds, for the rows that this rank samples: the `FIELDS` of `loongjax.sampling.fields`
    and `sample_position`; and `rows_used` of the fullest rank.

    Prefill, T local tokens: `token`, `position`; `target`, the prompt's token after each, and
    `score_begin` and `score_end`, the local tokens for which that one's log-probability is wanted
    (from 0 to 0: none); `first`, the first visible local index;
    `keep` [n, T], the slot of each token that arrives in each ring step; `used`; and
    `sample_index` [n * rows], the local index of the token whose successor a row samples,
    or -1 where another rank has it.

    Extend: as prefill and, for up to n * `rows` chunks in local order, `chunk_begin`, `chunk_end`,
    `chunk_start`, `history_start`, `history_entries`; `query_trips` and `key_trips` (see
    `loongjax.esp.history`).

    Decode, R rows for each rank and A = n * R in the group: `token` and `source` of this
    rank's rows (source >= 0 takes the token from the last step's output instead); for all
    rows of the group: `position`, the `write` slot here, `start` and `entries` in this
    rank's table; `update` [A, 4] of the table, `(index, slot, position, count)`; and `recent`
    [R, RECENT], generated tokens that the rows' sampling tables lack, or -1.

    Migrate, B tokens: for each other rank, `hop` places on, `send` [n - 1, B], the slots that
    go there; `receive`, the slots for what comes from `hop` places back; `trips` [n - 1], the
    tiles of the rank with most to send.
    """
    if kind == "migrate":
        return MetaLayout({"send": (n - 1, size), "receive": (n - 1, size), "trips": (n - 1,)})
    sampling: dict[str, tuple[int, ...]] = {
        **dict.fromkeys((*FIELDS, "sample_position"), (rows,)),
        "rows_used": (),
    }
    if kind != "decode":
        fields: dict[str, tuple[int, ...]] = {
            "token": (size,),
            "position": (size,),
            "target": (size,),
            "score_begin": (),
            "score_end": (),
            "first": (size,),
            "keep": (n, size),
            "used": (),
            "sample_index": (n * rows,),
            **sampling,
        }
        if kind == "extend":
            fields |= dict.fromkeys(_CHUNK_FIELDS, (n * rows,))
            fields |= {"query_trips": (), "key_trips": ()}
        return MetaLayout(fields)
    group_rows = n * rows
    return MetaLayout(
        {
            "token": (rows,),
            "source": (rows,),
            "position": (group_rows,),
            "write": (group_rows,),
            "start": (group_rows,),
            "entries": (group_rows,),
            "update": (group_rows, 4),
            "recent": (rows, RECENT),
            **sampling,
        }
    )
