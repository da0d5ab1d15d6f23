"""Rows that read the same table entries, so that a kernel fetches their keys once."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.paged_attention import RowTables


class Visits(NamedTuple):
    """Visits, in the order of rows: neighbours in a tile with the same entries, and not none.

    Attributes:
      begin_I: The first visit of each tile; tile i has those up to `begin_I[i + 1]`.
      start_V: Their first entries; there is always a place behind the last visit.
      entries_V: How many entries; as long as `start_V`.
      visit_R: The visit of each row; -1 for a row without entries.
    """

    begin_I: Int32[Array, " I"]
    start_V: Int32[Array, " V"]
    entries_V: Int32[Array, " V"]
    visit_R: Int32[Array, " R"]


def visits(rows: RowTables, tile: int) -> Visits:
    """Finds the visits of tiles of `tile` rows; the last tile may be shorter."""
    count = rows.start_R.shape[0]
    row_R = jnp.arange(count, dtype=jnp.int32)
    before = (jnp.roll(rows.start_R, 1), jnp.roll(rows.entries_R, 1))
    differs_R = (rows.start_R != before[0]) | (rows.entries_R != before[1])
    begins_R = (differs_R | (row_R % tile == 0)) & (rows.entries_R > 0)
    passed_R = jnp.cumsum(begins_R, dtype=jnp.int32)
    place_R = jnp.where(begins_R, passed_R - 1, count + 1)  # out of bounds: dropped
    nothing_V = jnp.zeros(count + 1, jnp.int32)
    tile_ends = jnp.minimum(jnp.arange(tile, count + tile, tile, dtype=jnp.int32), count) - 1
    return Visits(
        begin_I=jnp.concatenate([jnp.zeros(1, jnp.int32), passed_R[tile_ends]]),
        start_V=nothing_V.at[place_R].set(rows.start_R, mode="drop"),
        entries_V=nothing_V.at[place_R].set(rows.entries_R, mode="drop"),
        visit_R=jnp.where(rows.entries_R > 0, passed_R - 1, -1),
    )
