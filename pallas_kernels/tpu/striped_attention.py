"""`fold_stripe` on TPU: one ring step of striped attention, through Mosaic.

The contract is that of `pallas_kernels.striped_attention.fold_stripe`. The grid is (query heads,
tiles of queries, tiles of keys). Tiles of keys that no query of a tile sees are neither fetched nor
computed; those that every query sees whole are folded without a mask.

Scores are held with keys in rows and queries in lanes, so that the running maximum and sum are
plain rows of lanes, as they lie in memory, and the sums over keys are additions of registers.
Several query heads of one KV head share a program, and so its keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.causal_tiles import KeyTiles, Tiles, causal_pairs, key_tiles
from pallas_kernels.partials import Carry
from pallas_kernels.softmax import LN_2, LOG2_E, Scores, fold_scores, precision_of

_LANES = 128
_TILES = (512, 256, 128)
_MOST_QUERIES = 1024  # of all heads of a program


def tiles_for(tokens: int) -> Tiles:
    """The largest tiles that divide a stripe. Raises ValueError where none does."""
    if tokens < _LANES:
        return Tiles(tokens, tokens)
    for tile in _TILES:
        if tokens % tile == 0:
            return Tiles(tile, tile)
    raise ValueError(f"a stripe of {tokens} tokens is no multiple of {_LANES}, which tiles need")


def heads_at_once(group: int, queries: int) -> int:
    """How many of the query heads of a KV head share a program."""
    most = max(1, _MOST_QUERIES // queries)
    return next(heads for heads in range(min(group, most), 0, -1) if group % heads == 0)


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
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Carry:
    """Folds a key stripe into the running softmax of a query stripe, in place.

    The carry of queries that see no key stays as it was. Work: 4*H*D flops for each visible
    pair, rounded up to tiles. Raises ValueError as `tiles_for` does.
    """
    heads, tokens, head_dim = q_HxTxD.shape
    kv_heads, itemsize = k_GxTxD.shape[0], q_HxTxD.dtype.itemsize
    tiles = tiles or tiles_for(tokens)
    together = heads_at_once(heads // kv_heads, tiles.queries)
    programs = heads // together
    grid = (programs, tokens // tiles.queries, tokens // tiles.keys)
    last_T = jnp.minimum(jnp.arange(tokens, dtype=jnp.int32) - shift, used - 1)
    by_tile = (grid[1], tiles.queries)
    bounds = key_tiles(first_T.reshape(by_tile), last_T.reshape(by_tile), tiles.keys, axis=1)
    scalars = (*bounds, jnp.asarray(used, jnp.int32).reshape(1))

    def query_tile(p: Any, i: Any, j: Any, *scalars: Any) -> tuple:
        return p, 0, i, 0

    def row_tile(p: Any, i: Any, j: Any, *scalars: Any) -> tuple:
        return p, 0, i

    def key_tile(
        p: Any, i: Any, j: Any, first: Any, inner: Any, diagonal: Any, end: Any, _: Any
    ) -> tuple:
        # A tile outside the bounds is not fetched: the one fetched last is named again.
        nearest = jnp.clip(j, first[i], jnp.maximum(end[i] - 1, first[i]))
        return lax.div(p * together, heads // kv_heads), jnp.minimum(nearest, grid[2] - 1), 0

    def limit_tile(p: Any, i: Any, j: Any, *scalars: Any) -> tuple:
        return 0, i

    row_spec = pl.BlockSpec((1, together, tiles.queries), row_tile)
    query_spec = pl.BlockSpec((1, together, tiles.queries, head_dim), query_tile)
    key_spec = pl.BlockSpec((1, tiles.keys, head_dim), key_tile)
    limit_spec = pl.BlockSpec((1, tiles.queries), limit_tile)
    rows = (programs, together, tokens)
    packed = together * tiles.queries
    pairs = programs * causal_pairs(tokens, tiles)
    m, l, o = pl.pallas_call(  # noqa: E741
        partial(_kernel, scores=Scores(scale, soft_cap), tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[
                *(limit_spec, limit_spec, query_spec, key_spec, key_spec),
                *(row_spec, row_spec, query_spec),
            ],
            out_specs=[row_spec, row_spec, query_spec],
            scratch_shapes=[
                pltpu.VMEM((1, packed), jnp.float32),
                pltpu.VMEM((1, packed), jnp.float32),
                pltpu.VMEM((head_dim, packed), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(rows, jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
            jax.ShapeDtypeStruct((*rows, head_dim), jnp.float32),
        ],
        input_output_aliases={len(scalars) + 5 + i: i for i in range(3)},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * packed * tiles.keys * head_dim,
            transcendentals=pairs * packed * tiles.keys,
            bytes_accessed=heads * tokens * (head_dim * (itemsize + 8) + 16)
            + 2 * pairs * tiles.keys * head_dim * itemsize,
        ),
        interpret=interpret,
        name="striped_attention",
    )(
        *scalars,
        first_T[None],
        last_T[None],
        q_HxTxD.reshape(*rows, head_dim),
        k_GxTxD,
        v_GxTxD,
        carry_HxT.m.reshape(rows),
        carry_HxT.l.reshape(rows),
        carry_HxT.o.reshape(*rows, head_dim),
    )
    return Carry(*(leaf.reshape(heads, tokens, *leaf.shape[3:]) for leaf in (m, l, o)))


def _kernel(
    first_I: Any,
    inner_I: Any,
    diagonal_I: Any,
    end_I: Any,
    used_ref: Any,
    first_ref: Any,
    last_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    m_ref: Any,
    l_ref: Any,
    o_ref: Any,
    m_out: Any,
    l_out: Any,
    o_out: Any,
    m_1xP: Any,
    l_1xP: Any,
    o_DxP: Any,
    *,
    scores: Scores,
    tiles: Tiles,
) -> None:
    """P = heads of the program * queries of the tile, packed in lanes."""
    i, j = pl.program_id(1), pl.program_id(2)
    bounds = KeyTiles(first_I[i], inner_I[i], diagonal_I[i], end_I[i])
    _, heads, queries, head_dim = q_ref.shape
    packed = heads * queries

    def by_head(x_1xP: jax.Array) -> jax.Array:
        return x_1xP.reshape(heads, queries)

    @pl.when(j == 0)
    def load() -> None:
        m_1xP[...] = m_ref[0].reshape(1, packed) * LOG2_E
        l_1xP[...] = l_ref[0].reshape(1, packed)
        o_DxP[...] = o_ref[0].reshape(packed, head_dim).T

    def fold(*, masked: bool) -> None:
        q_PxD = q_ref[0].reshape(packed, head_dim)
        k_KxD, v_KxD = k_ref[0], v_ref[0]
        dot = partial(
            lax.dot_general,
            precision=precision_of(q_PxD.dtype),
            preferred_element_type=jnp.float32,
        )
        s_KxP = scores.of(dot(k_KxD, q_PxD, (((1,), (1,)), ((), ()))))
        if masked:
            key_KxQ = j * tiles.keys + lax.broadcasted_iota(jnp.int32, (tiles.keys, queries), 0)
            visible_KxQ = (key_KxQ >= first_ref[...]) & (key_KxQ <= last_ref[...])
            hidden_KxQ = jnp.where(visible_KxQ, 0.0, -jnp.inf)
            # Scores of unused keys may be NaN, which no sum would hide.
            s_KxP = jnp.where(jnp.concatenate([hidden_KxQ] * heads, axis=1) == 0.0, s_KxP, -jnp.inf)
            key_Kx1 = j * tiles.keys + lax.broadcasted_iota(jnp.int32, (tiles.keys, 1), 0)
            v_KxD = jnp.where(key_Kx1 < used_ref[0], v_KxD, 0)
        weights = fold_scores(m_1xP[...], s_KxP, axis=0)
        pv_DxP = dot(v_KxD, weights.p.astype(v_KxD.dtype), (((0,), (0,)), ((), ())))
        m_1xP[...] = weights.m
        l_1xP[...] = l_1xP[...] * weights.shrink + weights.p.sum(0, keepdims=True)
        o_DxP[...] = o_DxP[...] * weights.shrink + pv_DxP

    whole = (j >= bounds.inner) & (j < bounds.diagonal)
    inside = (j >= bounds.first) & (j < bounds.end)
    pl.when(whole)(partial(fold, masked=False))
    pl.when(inside & jnp.logical_not(whole))(partial(fold, masked=True))

    @pl.when(j == pl.num_programs(2) - 1)
    def store() -> None:
        nothing_seen = bounds.first >= bounds.end  # converting there and back would round
        m_out[0] = jnp.where(nothing_seen, m_ref[0], by_head(m_1xP[...] * LN_2))
        l_out[0] = by_head(l_1xP[...])
        o_out[0] = o_DxP[...].T.reshape(heads, queries, head_dim)
