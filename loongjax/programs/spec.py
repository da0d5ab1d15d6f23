"""What a program is compiled for, and the layout of what a step feeds into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Array, Int32

from loongjax.plan import Group

Kind: TypeAlias = Literal["prefill", "extend", "decode"]

_Vector = TypeVar("_Vector", np.ndarray, Array)


_CHUNK_FIELDS = ("chunk_begin", "chunk_end", "chunk_start", "history_start", "history_entries")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class ProgramSpec:
    """One compiled program.

    Attributes:
      kind: `prefill` computes chunks that begin their requests, `extend` such with history,
        `decode` one token for each row.
      degree: Instances of the groups it runs on.
      bucket: Local tokens of each rank (prefill), or rows of each rank (decode).
      rows: Rows of each rank that sample a token.
      placement: The one group that it runs on, where routing is compiled in; None where a
        program can be rebound to any group of its degree.
    """

    kind: Kind
    degree: int
    bucket: int
    rows: int
    placement: Group | None = None

    @property
    def name(self) -> str:
        """A short readable name."""
        return f"{self.kind}-d{self.degree}-t{self.bucket}-r{self.rows}"


class MetaLayout:
    """Names and places of a step's small inputs in one int32 vector for each rank.

    A transfer to a device costs much more than its bytes, so a step makes one. Both sides
    read this: the host fills numpy views, the program slices the same places.
    """

    def __init__(self, fields: Mapping[str, tuple[int, ...]]) -> None:
        self._fields = dict(fields)
        self.size = sum(prod(shape) for shape in self._fields.values())

    def views(self, vector: _Vector) -> dict[str, _Vector]:
        """The fields of one rank's vector; views of it in numpy, slices under jax."""
        found, at = {}, 0
        for name, shape in self._fields.items():
            found[name] = vector[at : at + prod(shape)].reshape(shape)
            at += prod(shape)
        return found


Meta: TypeAlias = Mapping[str, Int32[Array, "..."]]


def meta_layout(spec: ProgramSpec) -> MetaLayout:
    """The inputs of one rank, for a spec of degree n.

    Of both kinds: `temperature` (float32 bits), `seed` and `sample_position` of the rows
    that this rank samples, and `rows_used` of the fullest rank.

    Prefill, T local tokens: `token`, `position`; `first`, the first visible local index;
    `keep` [n, T], the slot of each token that arrives in each ring step; `used`; and
    `sample_index` [n * rows], the local index of the token whose successor a row samples,
    or -1 where another rank has it.

    Extend: as prefill and, for up to `rows` chunks in local order, `chunk_begin`, `chunk_end`,
    `chunk_start`, `history_start`, `history_entries`; `query_trips` and `key_trips` (see
    `loongjax.esp.history`).

    Decode, R rows for each rank and A = n * R in the group: `token` and `source` of this
    rank's rows (source >= 0 takes the token from the last step's output instead); for all
    rows of the group: `position`, the `write` slot here, `start` and `entries` in this
    rank's table; and `update` [A, 4] of the table, `(index, slot, position, count)`.
    """
    n, size, rows = spec.degree, spec.bucket, spec.rows
    sampling: dict[str, tuple[int, ...]] = {
        "temperature": (rows,),
        "seed": (rows,),
        "sample_position": (rows,),
        "rows_used": (),
    }
    if spec.kind != "decode":
        fields: dict[str, tuple[int, ...]] = {
            "token": (size,),
            "position": (size,),
            "first": (size,),
            "keep": (n, size),
            "used": (),
            "sample_index": (n * rows,),
            **sampling,
        }
        if spec.kind == "extend":
            fields |= dict.fromkeys(_CHUNK_FIELDS, (rows,))
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
            **sampling,
        }
    )
