"""Queries over KV that lies in a pool's blocks, for one layer and one rank.

A rank's table is int32 [N, 3] of `(slot, position, count)`: `count` consecutive tokens of
a request, the first at `position`, in consecutive slots from `slot`, never more than
`block_size`. Each query row owns the table entries `start .. start + entries`. Their order
does not matter, and a row with no entries gives `o = 0`, `lse = -inf`.

This is the XLA path: one loop over work items (row, a chunk of its entries), with a
run-time trip count. Rows of any length share one program, and a short row next to a long
one costs what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from pallas_kernels.partials import Carry, Partial, empty_carry, finish, fold_weights

_CHUNK_TOKENS = 128  # KV tokens of one work item: 128 to 256 were the fastest on CPU


class RowTables(NamedTuple):
    """Which entries each row reads, and what it may see of them.

    `position_R` is the query's own position: keys at or after it are not read here (the
    token's own key joins as a partial of its own). `first_R` is the first visible position,
    0 without a sliding window.
    """

    table_Nx3: Int32[Array, "N 3"]
    start_R: Int32[Array, " R"]
    entries_R: Int32[Array, " R"]
    position_R: Int32[Array, " R"]
    first_R: Int32[Array, " R"]


def chunk_entries(block_size: int) -> int:
    """Table entries of one work item; a table needs this many spare entries at its end."""
    return max(1, _CHUNK_TOKENS // block_size)


class Keys(NamedTuple):
    """The keys that some consecutive table entries name; K = entries * block_size.

    X = G * D: heads lie side by side, as they are stored. Where `valid_K` is False, an entry
    had fewer tokens than a block, or the range ended; there, numbers are finite or zero only
    in `v_KxX`.
    """

    k_KxX: Float[Array, "K X"]
    v_KxX: Float[Array, "K X"]
    position_K: Int32[Array, " K"]
    valid_K: Bool[Array, " K"]


def load_keys(
    k_pool: Shaped[Array, "L S G D"],
    v_pool: Shaped[Array, "L S G D"],
    table_Nx3: Int32[Array, "N 3"],
    start: Int32[Array, ""],
    count: Int32[Array, ""],
    *,
    layer: int | Int32[Array, ""],
    block_size: int,
    decode: Callable[[Array], Array] = lambda x: x,
) -> Keys:
    """Loads the keys of one work item: `count` table entries from `start`, at most
    `chunk_entries(block_size)`.

    Slots that no entry names may be read, but are not passed on, even if they hold NaN.
    """
    layers, slots, kv_heads, head_dim = k_pool.shape
    step = chunk_entries(block_size)
    found = lax.dynamic_slice(table_Nx3, (start, 0), (step, 3))
    offset = jnp.arange(block_size, dtype=jnp.int32)
    listed = (jnp.arange(step, dtype=jnp.int32) < count)[:, None]
    valid_K = (listed & (offset < found[:, 2:3])).reshape(-1)
    slot_K = jnp.where(valid_K, (found[:, 0:1] + offset).reshape(-1), 0)

    def load(pool: Array) -> Array:
        flat = pool.reshape(layers * slots, kv_heads * head_dim)
        return decode(flat.at[layer * slots + slot_K].get(mode="promise_in_bounds"))

    return Keys(
        k_KxX=load(k_pool),
        v_KxX=jnp.where(valid_K[:, None], load(v_pool), 0),
        position_K=(found[:, 1:2] + offset).reshape(-1),
        valid_K=valid_K,
    )


def paged_attention(
    q_RxHxD: Float[Array, "R H D"],
    k_pool: Shaped[Array, "L S G D"],
    v_pool: Shaped[Array, "L S G D"],
    rows: RowTables,
    *,
    layer: int | Int32[Array, ""],
    block_size: int,
    scale: float,
    decode: Callable[[Array], Array] = lambda x: x,
) -> Partial:
    """Attends each row's query over the row's entries; returns `(o_RxHxD, lse_RxH)`.

    `decode` turns stored rows of the pool into numbers (pools may hold bf16 as uint16).
    Work: 4*H*D flops and 2*G*D stored elements per KV token, rounded up to chunks of 128
    tokens.
    """
    row_count, heads, head_dim = q_RxHxD.shape
    kv_heads = k_pool.shape[2]
    step = chunk_entries(block_size)
    chunks_R = (rows.entries_R + step - 1) // step
    ends_R = jnp.cumsum(chunks_R)
    q_RxHxX = spread_heads(q_RxHxD, kv_heads)

    def work_item(w: Array, carry: Carry) -> Carry:
        r = jnp.sum(ends_R <= w, dtype=jnp.int32)
        first_entry = (w - (ends_R[r] - chunks_R[r])) * step
        keys = load_keys(
            k_pool,
            v_pool,
            rows.table_Nx3,
            rows.start_R[r] + first_entry,
            rows.entries_R[r] - first_entry,
            layer=layer,
            block_size=block_size,
            decode=decode,
        )
        visible = keys.valid_K & (keys.position_K < rows.position_R[r])
        visible &= keys.position_K >= rows.first_R[r]
        q_HxX = lax.dynamic_index_in_dim(q_RxHxX, r, 0, keepdims=False)
        s = lax.dot_general(
            q_HxX, keys.k_KxX, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        m, p, shrink = fold_weights(carry.m[r], jnp.where(visible, s * scale, -jnp.inf))
        pv_HxX = lax.dot_general(
            p.astype(keys.v_KxX.dtype),
            keys.v_KxX,
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        pv = gather_heads(pv_HxX, kv_heads)
        return Carry(
            carry.m.at[r].set(m),
            carry.l.at[r].set(carry.l[r] * shrink + p.sum(-1)),
            carry.o.at[r].set(carry.o[r] * shrink[:, None] + pv),
        )

    carry = empty_carry((row_count, heads), head_dim)
    return finish(lax.fori_loop(0, ends_R[-1], work_item, carry))


def spread_heads(q_RxHxD: Float[Array, "R H D"], kv_heads: int) -> Float[Array, "R H X"]:
    """Puts each query head at its KV head's place in a row of zeros, X = G * D wide.

    Then scores of all heads are one matrix product with KV as it is stored. The zeros cost
    flops, but on CPU no transpose of K and V: 2 to 4 times faster at decode.
    """
    rows, heads, head_dim = q_RxHxD.shape
    place = (jnp.arange(heads) // (heads // kv_heads))[:, None] == jnp.arange(kv_heads)
    spread = jnp.where(place[None, :, :, None], q_RxHxD[:, :, None, :], 0)
    return spread.reshape(rows, heads, kv_heads * head_dim)


def gather_heads(x_HxX: Float[Array, "H X"], kv_heads: int) -> Float[Array, "H D"]:
    """Takes from each head's row the part of its own KV head: undoes `spread_heads`."""
    heads, wide = x_HxX.shape
    repeat = heads // kv_heads
    x = x_HxX.reshape(kv_heads, repeat, kv_heads, wide // kv_heads)
    own = [x[g, :, g] for g in range(kv_heads)]
    return jnp.concatenate(own, axis=0)
