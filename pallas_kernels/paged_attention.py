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
from jaxtyping import Array, Float, Int32, Shaped

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
    Slots that no entry names are read but never used, even if they hold NaN. Work: 4*H*D
    flops and 2*G*D stored elements per KV token, rounded up to chunks of 128 tokens.
    """
    row_count, heads, head_dim = q_RxHxD.shape
    layers, slots, kv_heads, _ = k_pool.shape
    step = chunk_entries(block_size)
    tokens = step * block_size
    chunks_R = (rows.entries_R + step - 1) // step
    ends_R = jnp.cumsum(chunks_R)
    q_RxHxX = spread_heads(q_RxHxD, kv_heads)

    def load(pool: Array, slot_C: Array) -> Array:
        flat = pool.reshape(layers * slots, kv_heads * head_dim)
        found = flat.at[layer * slots + slot_C].get(mode="promise_in_bounds")
        return decode(found)

    def work_item(w: Array, carry: Carry) -> Carry:
        r = jnp.sum(ends_R <= w, dtype=jnp.int32)
        chunk = w - (ends_R[r] - chunks_R[r])
        found = lax.dynamic_slice(rows.table_Nx3, (rows.start_R[r] + chunk * step, 0), (step, 3))
        offset = jnp.arange(block_size, dtype=jnp.int32)
        position = (found[:, 1:2] + offset).reshape(tokens)
        entry = jnp.repeat(chunk * step + jnp.arange(step, dtype=jnp.int32), block_size)
        visible = (offset < found[:, 2:3]).reshape(tokens) & (entry < rows.entries_R[r])
        visible &= (position < rows.position_R[r]) & (position >= rows.first_R[r])
        slot_C = jnp.where(visible, (found[:, 0:1] + offset).reshape(tokens), 0)
        k_CxX, v_CxX = load(k_pool, slot_C), load(v_pool, slot_C)
        q_HxX = lax.dynamic_index_in_dim(q_RxHxX, r, 0, keepdims=False)
        s = lax.dot_general(
            q_HxX, k_CxX, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        s = jnp.where(visible, s * scale, -jnp.inf)
        m, p, shrink = fold_weights(carry.m[r], s)
        v_CxX = jnp.where(visible[:, None], v_CxX, 0)  # unwritten memory may be NaN
        pv_HxX = lax.dot_general(
            p.astype(v_CxX.dtype),
            v_CxX,
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
