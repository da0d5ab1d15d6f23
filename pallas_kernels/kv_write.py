"""Chosen tokens into pool slots, in place.

The pool is `[L, P, G, D]`: its last slot belongs to nobody. Tokens that are not kept go
there, so that every write is in bounds and has a fixed shape.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


def kv_write(
    pool: Shaped[Array, "L P G D"],
    rows_TxGxD: Shaped[Array, "T G D"],
    slot_T: Int32[Array, " T"],
    *,
    layer: int | Int32[Array, ""],
) -> Shaped[Array, "L P G D"]:
    """Writes row t to slot `slot_T[t]` of a layer; the last slot swallows what is not kept.

    In place when the pool is donated and not read between this write and the one before
    (XLA would else copy it). T = 1 is written as two rows: XLA turns a scatter of one row
    into a select over a copy of the whole pool.
    """
    if slot_T.shape[0] == 1:
        trash = jnp.full((1,), pool.shape[1] - 1, jnp.int32)
        slot_T = jnp.concatenate([slot_T, trash])
        rows_TxGxD = jnp.concatenate([rows_TxGxD, rows_TxGxD])
    return pool.at[layer, slot_T].set(rows_TxGxD, mode="promise_in_bounds")
