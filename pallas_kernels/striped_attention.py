"""One ring step of causal attention between two stripes of packed prompts.

Stripe r of a prompt holds its tokens r, r+n, r+2n, … (striped attention, Brandon et al.
2023): every rank has the same local layout, and the work of a ring step is equal on all
ranks. With local indices i of a query and j of a key, plain causality becomes
`j <= i - shift`, where `shift` is 1 if the query's rank comes before the key's rank, else 0.
Prompts lie one behind the other in the local layout, so a query sees an interval of
local keys, from `first_T[i]` to `i - shift`: `first_T` keeps prompts apart and holds the
sliding window.

This is the XLA path: tiles in loops whose trip counts are run-time values, so that keys
beyond the diagonal, in other prompts, or outside the window cost nothing.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.partials import Carry, fold_keys, put_carry, slice_carry

_TILES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # 256 was the fastest on CPU in float32 and bf16


def tile_size(tokens: int) -> int:
    """The largest tile that divides a stripe of `tokens`."""
    return next(tile for tile in _TILES if tokens % tile == 0)


def fold_stripe(
    carry_HxT: Carry,
    q_HxTxD: Float[Array, "H T D"],
    k_GxTxD: Float[Array, "G T D"],
    v_GxTxD: Float[Array, "G T D"],
    first_T: Int32[Array, " T"],
    *,
    shift: Int32[Array, ""],
    used: Int32[Array, ""],
    scale: float,
    soft_cap: float | None = None,
) -> Carry:
    """Folds a key stripe into the running softmax of a query stripe.

    H is a multiple of G; query heads h share KV head h // (H // G). `first_T` is the first
    visible local key of each query, `used` how many of the T local tokens are in use: keys
    beyond are never used, even if they are NaN, and the carry of the tiles beyond stays as it
    was. Scores and sums are float32; scores are bent into (-soft_cap, soft_cap), if given.
    Work: 4*H*D flops for each visible pair, rounded up to tiles.
    """
    heads, tokens, head_dim = q_HxTxD.shape
    kv_heads = k_GxTxD.shape[0]
    tile = tile_size(tokens)
    in_use = jnp.arange(tokens, dtype=jnp.int32) < used
    v_GxTxD = jnp.where(in_use[:, None], v_GxTxD, 0)  # weight 0 times NaN would be NaN

    def query_tile(i: Array, carry: Carry) -> Carry:
        at = i * tile
        q_HxQxD = lax.dynamic_slice(q_HxTxD, (0, at, 0), (heads, tile, head_dim))
        first_Q = lax.dynamic_slice(first_T, (at,), (tile,))
        index_Q = at + jnp.arange(tile, dtype=jnp.int32)

        def fold(j: Array, running: Carry, visible_QxK: Array | None) -> Carry:
            place, shape = (0, j * tile, 0), (kv_heads, tile, head_dim)
            k_GxKxD = lax.dynamic_slice(k_GxTxD, place, shape)
            v_GxKxD = lax.dynamic_slice(v_GxTxD, place, shape)
            return fold_keys(running, q_HxQxD, k_GxKxD, v_GxKxD, visible_QxK, scale, soft_cap)

        def edge_tile(e: Array, running: Carry) -> Carry:
            j = jnp.where(e < inner - first, first + e, end - edges + e)
            key_K = j * tile + jnp.arange(tile, dtype=jnp.int32)
            visible = (key_K >= first_Q[:, None]) & (key_K <= (index_Q - shift)[:, None])
            return fold(j, running, visible)

        # `first` never decreases inside a prompt, and prompts follow each other: the tile's
        # first and last entries bound all of it. Tiles from `inner` to `diagonal` are seen
        # whole by every query, and need no mask.
        first, end = first_Q[0] // tile, (at + tile - 1 - shift) // tile + 1
        inner = jnp.minimum((first_Q[-1] + tile - 1) // tile, end)
        diagonal = jnp.maximum((at + 1 - shift) // tile, inner)
        edges = end - first - (diagonal - inner)
        running = slice_carry(carry, at, tile)
        running = lax.fori_loop(inner, diagonal, lambda j, c: fold(j, c, None), running)
        running = lax.fori_loop(0, edges, edge_tile, running)
        return put_carry(carry, running, at)

    return lax.fori_loop(0, (used + tile - 1) // tile, query_tile, carry_HxT)
