"""Rows that read the same table entries, so that a kernel loads their keys once."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.paged_attention import RowTables


class Segments(NamedTuple):
    """Neighbouring rows with the same entries make a segment.

    Segments are numbered in the order of rows: `segment_R[r]` is the one of row r, and a tile of
    rows a to b has those from `segment_R[a]` to `segment_R[b]`. Unused places at the end of
    `start_Z` and `entries_Z` have no entries.
    """

    segment_R: Int32[Array, " R"]
    start_Z: Int32[Array, " R"]
    entries_Z: Int32[Array, " R"]


def segments(rows: RowTables) -> Segments:
    """Finds the segments; there are at most as many as rows."""
    new_R = jnp.ones_like(rows.start_R, bool)
    same_R = (rows.start_R[1:] == rows.start_R[:-1]) & (rows.entries_R[1:] == rows.entries_R[:-1])
    segment_R = jnp.cumsum(new_R.at[1:].set(~same_R), dtype=jnp.int32) - 1
    nothing_Z = jnp.zeros_like(rows.start_R)
    return Segments(
        segment_R=segment_R,
        start_Z=nothing_Z.at[segment_R].set(rows.start_R),
        entries_Z=nothing_Z.at[segment_R].set(rows.entries_R),
    )
