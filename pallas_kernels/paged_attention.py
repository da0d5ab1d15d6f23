"""Queries over KV that lies in a pool's blocks, for one layer and one rank.

A rank's table is int32 [N, 3] of `(slot, position, count)`: `count` consecutive tokens of
a request, the first at `position`, in consecutive slots from `slot`, where a block begins, and
never more than `block_size`. A pool is whole blocks. Each query row owns the table entries
`start .. start + entries`. Their order does not matter, and a row with no entries gives
`o = 0`, `lse = -inf`.

This is the XLA path: loops over work items (row, a chunk of its entries), with run-time trip
counts. Rows of any length share one program, and a short row next to a long one costs what it
is worth. Several items are done at once, whosever they are, and what is left of them one by
one: on CPU a trip costs more in operations started than in numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from pallas_kernels.partials import Carry, Partial, bent, empty_carry, finish

_CHUNK_TOKENS = 128  # KV tokens of one work item: 128 to 256 were the fastest on CPU
_ITEMS_AT_ONCE = 8


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
    """The keys of W work items, each K = entries * block_size of consecutive table entries.

    X = G * D: heads lie side by side, as they are stored. Where `valid_WxK` is False, an entry
    had fewer tokens than a block, or the range ended; there, numbers are finite or zero only
    in `v_WxKxX`.
    """

    k_WxKxX: Float[Array, "W K X"]
    v_WxKxX: Float[Array, "W K X"]
    position_WxK: Int32[Array, "W K"]
    valid_WxK: Bool[Array, "W K"]


def load_keys(
    k_pool: Shaped[Array, "L S G D"],
    v_pool: Shaped[Array, "L S G D"],
    table_Nx3: Int32[Array, "N 3"],
    start_W: Int32[Array, " W"],
    count_W: Int32[Array, " W"],
    *,
    entries: int,
    layer: int | Int32[Array, ""],
    block_size: int,
    decode: Callable[[Array], Array] = lambda x: x,
) -> Keys:
    """Loads the keys of work items: for each, `count` table entries from `start`, at most
    `entries`; none if `count` is not positive.

    `decode` turns stored rows of the pool into numbers (pools may hold bf16 as uint16).
    Slots that no entry names may be read, but are not passed on, even if they hold NaN.
    """
    _, slots, kv_heads, head_dim = k_pool.shape
    wide = (start_W.shape[0], entries * block_size)
    entry = jnp.arange(entries, dtype=jnp.int32)
    listed_WxE = entry < count_W[:, None]
    at_WxE = jnp.where(listed_WxE, start_W[:, None] + entry, 0)
    found_WxEx3 = table_Nx3.at[at_WxE].get(mode="promise_in_bounds")
    offset = jnp.arange(block_size, dtype=jnp.int32)
    valid_WxK = (listed_WxE[..., None] & (offset < found_WxEx3[..., 2:3])).reshape(wide)
    block_WxE = jnp.where(listed_WxE, found_WxEx3[..., 0] // block_size, 0)
    block_WxE += layer * (slots // block_size)

    def load(pool: Array) -> Array:
        # Whole blocks: on CPU, a gather of long rows is several times faster than of short ones.
        blocks = pool.reshape(-1, block_size * kv_heads * head_dim)
        found = blocks.at[block_WxE].get(mode="promise_in_bounds")
        return decode(found).reshape(*wide, kv_heads * head_dim)

    return Keys(
        k_WxKxX=load(k_pool),
        v_WxKxX=jnp.where(valid_WxK[..., None], load(v_pool), 0),
        position_WxK=(found_WxEx3[..., 1:2] + offset).reshape(wide),
        valid_WxK=valid_WxK,
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
    soft_cap: float | None = None,
    decode: Callable[[Array], Array] = lambda x: x,
) -> Partial:
    """Attends each row's query over the row's entries; returns `(o_RxHxD, lse_RxH)`.

    `decode` as for `load_keys`. Products are float32, whatever is stored. Scores are bent into
    (-soft_cap, soft_cap), if given.
    Work: 4*H*D flops and 2*G*D stored elements per KV token, rounded up to chunks of 128
    tokens.
    """
    row_count, heads, head_dim = q_RxHxD.shape
    kv_heads = k_pool.shape[2]
    step = chunk_entries(block_size)
    chunks_R = (rows.entries_R + step - 1) // step
    ends_R = jnp.cumsum(chunks_R)
    q_RxHxX = spread_heads(q_RxHxD.astype(jnp.float32) * scale, kv_heads)

    def fold_items(item_W: Int32[Array, " W"], carry: Carry) -> Carry:
        row_W = jnp.sum(ends_R <= item_W[:, None], axis=1, dtype=jnp.int32)
        first_W = (item_W - (ends_R[row_W] - chunks_R[row_W])) * step
        keys = load_keys(
            k_pool,
            v_pool,
            rows.table_Nx3,
            rows.start_R[row_W] + first_W,
            rows.entries_R[row_W] - first_W,
            entries=step,
            layer=layer,
            block_size=block_size,
            decode=decode,
        )
        visible_WxK = keys.valid_WxK & (keys.position_WxK < rows.position_R[row_W][:, None])
        visible_WxK &= keys.position_WxK >= rows.first_R[row_W][:, None]
        # Keys first: on CPU that product is faster than queries first.
        s_WxKxH = _batch_dot(keys.k_WxKxX.astype(jnp.float32), q_RxHxX[row_W], (2, 2))
        s_WxKxH = bent(s_WxKxH, soft_cap)
        s_WxHxK = jnp.where(visible_WxK[:, None], s_WxKxH.swapaxes(1, 2), -jnp.inf)
        return _fold_by_row(carry, row_W, s_WxHxK, keys.v_WxKxX.astype(jnp.float32), kv_heads)

    def many(i: Array, carry: Carry) -> Carry:
        return fold_items(i * _ITEMS_AT_ONCE + jnp.arange(_ITEMS_AT_ONCE, dtype=jnp.int32), carry)

    carry = empty_carry((row_count, heads), head_dim)
    batches = ends_R[-1] // _ITEMS_AT_ONCE
    carry = lax.fori_loop(0, batches, many, carry)
    carry = lax.fori_loop(
        batches * _ITEMS_AT_ONCE, ends_R[-1], lambda i, c: fold_items(i[None], c), carry
    )
    return finish(carry)


def _fold_by_row(
    carry: Carry,
    row_W: Int32[Array, " W"],
    s_WxHxK: Float[Array, "W H K"],
    v_WxKxX: Float[Array, "W K X"],
    kv_heads: int,
) -> Carry:
    """Folds scores of work items into their rows' running softmax; rows may repeat."""
    row_count, heads, head_dim = carry.o.shape
    of_row_RxW = jnp.arange(row_count, dtype=jnp.int32)[:, None] == row_W
    m_RxWxH = jnp.where(of_row_RxW[..., None], s_WxHxK.max(-1), -jnp.inf)
    m_RxH = jnp.maximum(carry.m, m_RxWxH.max(1))
    base_RxH = jnp.where(m_RxH == -jnp.inf, 0.0, m_RxH)
    p_WxHxK = jnp.exp(s_WxHxK - base_RxH[row_W][..., None])
    o_WxHxD = gather_heads(_batch_dot(p_WxHxK, v_WxKxX, (2, 1)), kv_heads)
    shrink_RxH = jnp.exp(carry.m - base_RxH)
    by_row = partial(jnp.matmul, of_row_RxW.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    o_RxHxD = (by_row(o_WxHxD.reshape(-1, heads * head_dim))).reshape(carry.o.shape)
    return Carry(
        m_RxH,
        carry.l * shrink_RxH + by_row(p_WxHxK.sum(-1)),
        carry.o * shrink_RxH[..., None] + o_RxHxD,
    )


def _batch_dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def spread_heads(q_RxHxD: Float[Array, "R H D"], kv_heads: int) -> Float[Array, "R H X"]:
    """Puts each query head at its KV head's place in a row of zeros, X = G * D wide.

    Then scores of all heads are one matrix product with KV as it is stored. The zeros cost
    flops, but on CPU no transpose of K and V: 2 to 4 times faster at decode.
    """
    rows, heads, head_dim = q_RxHxD.shape
    place = (jnp.arange(heads) // (heads // kv_heads))[:, None] == jnp.arange(kv_heads)
    spread = jnp.where(place[None, :, :, None], q_RxHxD[:, :, None, :], 0)
    return spread.reshape(rows, heads, kv_heads * head_dim)


def gather_heads(x_WxHxX: Float[Array, "W H X"], kv_heads: int) -> Float[Array, "W H D"]:
    """Takes from each head's row the part of its own KV head: undoes `spread_heads`."""
    items, heads, wide = x_WxHxX.shape
    x = x_WxHxX.reshape(items, kv_heads, heads // kv_heads, kv_heads, wide // kv_heads)
    own = [x[:, g, :, g] for g in range(kv_heads)]
    return jnp.concatenate(own, axis=1)
