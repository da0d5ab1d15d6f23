"""`paged_attention` on GPU: ragged queries over KV in a pool's blocks, through Triton.

The contract is that of `pallas_kernels.paged_attention.paged_attention`. A program of the grid
takes a tile of rows, all query heads of one KV head (so that keys are read once for them), and a
share of the keys: where rows are few, KV is split so that all of the chip works. The shares'
partial results are merged in float32.

Keys are fetched by slot, one address for each key, so that blocks may have any size. Keys that
no row of the tile may see are not fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.paged_attention import RowTables
from pallas_kernels.partials import Partial, merge
from pallas_kernels.softmax import LN_2, Scores, fold_scores, precision_of
from pallas_kernels.visits import visits

_Running = tuple[jax.Array, jax.Array, jax.Array]  # m, l, o
_LEAST_TILE = 16  # of a product on tensor cores
_PROGRAMS = 256  # that keep a chip busy: about two for each multiprocessor
_MOST_SPLITS = 32


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      rows: Query rows of a program. Rows that share their entries share their keys.
      keys: Keys of one product.
      splits: Shares that the keys of each row are cut into.
    """

    rows: int
    keys: int
    splits: int


def tiling_for(
    rows: int, kv_heads: int, head_dim: int, itemsize: int, *, rows_at_once: int
) -> Tiling:
    """Raises ValueError where the head size is no power of two (as Triton wants it)."""
    if head_dim < _LEAST_TILE or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim {head_dim} must be a power of two, at least {_LEAST_TILE}")
    programs = pl.cdiv(rows, rows_at_once) * kv_heads
    splits = min(_MOST_SPLITS, pl.next_power_of_2(pl.cdiv(_PROGRAMS, programs)))
    return Tiling(rows_at_once, max(_LEAST_TILE, min(64, 16384 // (head_dim * itemsize))), splits)


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
    rows_at_once: int = 1,
    decode: Callable[[Array], Array] = lambda x: x,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Partial:
    """Attends each row's query over the row's entries; returns `(o_RxHxD, lse_RxH)`.

    `rows_at_once`: neighbouring rows that are worth taking together, since they share their
    entries. The result does not depend on it. Work: 4*H*D flops and 2*G*D stored elements per
    KV token and tile of rows. Raises ValueError as `tiling_for` does.
    """
    count, heads, head_dim = q_RxHxD.shape
    kv_heads, itemsize = k_pool.shape[2], k_pool.dtype.itemsize
    tiling = tiling or tiling_for(count, kv_heads, head_dim, itemsize, rows_at_once=rows_at_once)
    found = visits(rows, tiling.rows)
    listed = rows.table_Nx3.shape[0] * block_size  # more keys than that no row can name
    whole = pl.BlockSpec()
    o, lse = pl.pallas_call(
        partial(
            _kernel,
            scores=Scores(scale, soft_cap),
            tiling=tiling,
            block_size=block_size,
            decode=decode,
        ),
        grid=(pl.cdiv(count, tiling.rows), kv_heads, tiling.splits),
        in_specs=[whole] * 11,
        out_specs=[whole] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((tiling.splits, count, heads, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((tiling.splits, count, heads), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=4 * listed * heads * head_dim * tiling.rows,
            transcendentals=listed * heads * tiling.rows,
            bytes_accessed=2 * listed * kv_heads * head_dim * itemsize
            + count * heads * head_dim * (itemsize + 4 * tiling.splits),
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        *found,
        rows.position_R,
        rows.first_R,
        rows.table_Nx3,
        q_RxHxD,
        k_pool,
        v_pool,
    )
    return merge(o, lse) if tiling.splits > 1 else Partial(o[0], lse[0])


def _kernel(
    layer_ref: Any,
    begin_ref: Any,
    start_ref: Any,
    entries_ref: Any,
    visit_ref: Any,
    position_ref: Any,
    first_ref: Any,
    table_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    *,
    scores: Scores,
    tiling: Tiling,
    block_size: int,
    decode: Callable[[Array], Array],
) -> None:
    count, heads, head_dim = q_ref.shape
    group = heads // k_ref.shape[2]
    kv_head, split = pl.program_id(1), pl.program_id(2)
    # A query is one row's one head; those of a KV head are packed behind each other.
    queries = max(_LEAST_TILE, pl.next_power_of_2(tiling.rows * group))
    packed_Q = jnp.arange(queries, dtype=jnp.int32)
    at = pl.program_id(0) * tiling.rows
    row_Q = at + packed_Q // group
    real_Q = (packed_Q < tiling.rows * group) & (row_Q < count)
    row_Q = jnp.where(real_Q, row_Q, count)  # out of bounds, and masked wherever it is used
    head_Q = kv_head * group + packed_Q % group
    position_Q, first_Q, visit_Q = (
        plgpu.load(ref.at[row_Q], mask=real_Q, other=-2)
        for ref in (position_ref, first_ref, visit_ref)
    )

    def spread(x_Q: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x_Q[:, None], (queries, head_dim))

    lane_QxD = lax.broadcasted_iota(jnp.int32, (queries, head_dim), 1)
    place_QxD = (spread(row_Q), spread(head_Q), lane_QxD)
    q_QxD = plgpu.load(q_ref.at[place_QxD], mask=spread(real_Q), other=0)
    lane_KxD = lax.broadcasted_iota(jnp.int32, (tiling.keys, head_dim), 1)
    dot = partial(
        lax.dot_general,
        precision=precision_of(q_QxD.dtype),
        preferred_element_type=jnp.float32,
    )

    def fold_visit(visit: jax.Array, carry: _Running) -> _Running:
        start, tokens = start_ref[visit], entries_ref[visit] * block_size
        mine_Q = visit_Q == visit
        nearest = jnp.where(mine_Q, first_Q, 2**30).min()
        furthest = jnp.where(mine_Q, position_Q, 0).max()

        def fold(j: jax.Array, carry: _Running) -> _Running:
            m_Qx1, l_Qx1, o_QxD = carry
            token_K = j * tiling.keys + jnp.arange(tiling.keys, dtype=jnp.int32)
            listed_K = token_K < tokens
            entry_K = jnp.where(listed_K, start + token_K // block_size, 0)
            offset_K = token_K % block_size
            slot_K, from_K, count_K = (
                plgpu.load(table_ref.at[entry_K, jnp.full_like(entry_K, i)], mask=listed_K, other=0)
                for i in range(3)
            )
            key_K = from_K + offset_K
            wanted_K = listed_K & (offset_K < count_K) & (key_K >= nearest) & (key_K < furthest)
            # Indexed by dimension: Triton's offsets are 64 bits wide where a pool needs it.
            place_KxD = (
                layer_ref[0],
                jnp.broadcast_to(
                    jnp.where(wanted_K, slot_K + offset_K, 0)[:, None], lane_KxD.shape
                ),
                kv_head,
                lane_KxD,
            )
            wanted_KxD = jnp.broadcast_to(wanted_K[:, None], lane_KxD.shape)
            k_KxD, v_KxD = (
                decode(plgpu.load(ref.at[place_KxD], mask=wanted_KxD, other=0)).astype(q_QxD.dtype)
                for ref in (k_ref, v_ref)
            )
            s_QxK = scores.of(dot(q_QxD, k_KxD, (((1,), (1,)), ((), ()))))
            visible_QxK = mine_Q[:, None] & wanted_K[None, :]
            visible_QxK &= (key_K[None, :] < position_Q[:, None]) & (
                key_K[None, :] >= first_Q[:, None]
            )
            weights = fold_scores(m_Qx1, jnp.where(visible_QxK, s_QxK, -jnp.inf), axis=1)
            pv_QxD = dot(weights.p.astype(v_KxD.dtype), v_KxD, (((1,), (0,)), ((), ())))
            return (
                weights.m,
                l_Qx1 * weights.shrink + weights.p.sum(1, keepdims=True),
                o_QxD * weights.shrink + pv_QxD,
            )

        tiles = pl.cdiv(tokens, tiling.keys)
        share = pl.cdiv(tiles, tiling.splits)
        begin = split * share
        return lax.fori_loop(begin, jnp.minimum(begin + share, tiles), fold, carry)

    carry = (
        jnp.full((queries, 1), -jnp.inf, jnp.float32),
        jnp.zeros((queries, 1), jnp.float32),
        jnp.zeros((queries, head_dim), jnp.float32),
    )
    begin, end = begin_ref[pl.program_id(0)], begin_ref[pl.program_id(0) + 1]
    m_Qx1, l_Qx1, o_QxD = lax.fori_loop(begin, end, fold_visit, carry)
    seen_Qx1 = l_Qx1 > 0
    divisor_Qx1 = jnp.where(seen_Qx1, l_Qx1, 1.0)
    lse_Qx1 = jnp.where(seen_Qx1, m_Qx1 * LN_2 + jnp.log(divisor_Qx1), -jnp.inf)
    plgpu.store(o_ref.at[(split, *place_QxD)], o_QxD / divisor_Qx1, mask=spread(real_Q))
    plgpu.store(lse_ref.at[split, row_Q, head_Q], lse_Qx1.reshape(queries), mask=real_Q)
