"""Which tiles of a stripe's attention have work: the sums behind grids and cost estimates."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """Queries and keys of one tile of scores."""

    queries: int
    keys: int


class KeyTiles(NamedTuple):
    """The key tiles that a tile of queries has to look at: `[first, end)`.

    Those in `[inner, diagonal)` are seen whole by every query of the tile, and need no mask.
    """

    first: jax.Array
    inner: jax.Array
    diagonal: jax.Array
    end: jax.Array


def key_tiles(
    first_Q: jax.Array, last_Q: jax.Array, keys: int, axis: int | None = None
) -> KeyTiles:
    """Bounds for queries that see the keys `first_Q` to `last_Q`, both included, in tiles of
    `keys`. Nothing is taken for granted of their order. With `axis`, one for each row.
    """
    # A query that sees nothing must not push the bounds of its tile apart.
    blind = last_Q < first_Q
    far = jnp.int32(2**30)
    lowest = jnp.where(blind, far, first_Q).min(axis)
    highest = jnp.where(blind, -1, last_Q).max(axis)
    end = (highest + keys) // keys
    first = jnp.minimum(lowest // keys, end)
    inner = jnp.clip((first_Q.max(axis) + keys - 1) // keys, first, end)
    diagonal = jnp.clip((last_Q.min(axis) + 1) // keys, inner, end)
    return KeyTiles(first, inner, diagonal, end)


def causal_pairs(tokens: int, tiles: Tiles) -> int:
    """Tiles of scores that one head computes at most: one causal prompt fills the stripe."""
    return sum(-(-(at + tiles.queries) // tiles.keys) for at in range(0, tokens, tiles.queries))
