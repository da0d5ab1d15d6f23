"""`fold_stripe` on GPU: one ring step of striped attention, through Triton.

The contract is that of `pallas_kernels.striped_attention.fold_stripe`. A program of the grid
folds all keys that a tile of one head's queries can see; how many tiles of keys those are is a
run-time value. Tiles that every query sees whole are folded without a mask.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.causal_tiles import Tiles, causal_pairs, key_tiles
from pallas_kernels.partials import Carry
from pallas_kernels.softmax import LN_2, LOG2_E, Scores, fold_scores, precision_of

_Running = tuple[jax.Array, jax.Array, jax.Array]  # m, l, o
_LEAST_TILE = 16  # of a product on tensor cores
# By bytes of one token's key. Exact float32 products are no work of tensor cores: their operands
# lie in registers, and larger tiles do not fit.
_TILES = {
    2: ((256, Tiles(128, 64)), (512, Tiles(64, 32))),
    4: ((256, Tiles(64, 32)), (1024, Tiles(32, 32))),
}


def tiles_for(tokens: int, head_dim: int, itemsize: int) -> Tiles:
    """Tiles whose operands fit a program's registers and shared memory.

    Raises ValueError where no tile of 16 tokens or more divides the stripe, or the head size
    is no power of two (which Triton wants of every shape).
    """
    sizes = _TILES[itemsize]
    most = sizes[-1][0] // itemsize
    if head_dim < _LEAST_TILE or head_dim & (head_dim - 1) or head_dim > most:
        raise ValueError(
            f"head_dim {head_dim} must be a power of two, at least {_LEAST_TILE} and at most "
            f"{most} with {itemsize} bytes per number"
        )
    wanted = next(tiles for most, tiles in sizes if head_dim * itemsize <= most)
    found = Tiles(*(min(size, tokens & -tokens) for size in wanted))
    if min(found) < _LEAST_TILE:
        raise ValueError(
            f"a stripe of {tokens} tokens is no multiple of {_LEAST_TILE}, which tiles need"
        )
    return found


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
    interpret: bool = False,
) -> Carry:
    """Folds a key stripe into the running softmax of a query stripe, in place.

    The carry of queries that see no key stays as it was. Work: 4*H*D flops for each visible
    pair, rounded up to tiles. Raises ValueError as `tiles_for` does.
    """
    heads, tokens, head_dim = q_HxTxD.shape
    kv_heads, itemsize = k_GxTxD.shape[0], q_HxTxD.dtype.itemsize
    tiles = tiles or tiles_for(tokens, head_dim, itemsize)
    pairs = heads * causal_pairs(tokens, tiles)
    whole = pl.BlockSpec()
    m, l, o = pl.pallas_call(  # noqa: E741
        partial(_kernel, scores=Scores(scale, soft_cap), tiles=tiles, group=heads // kv_heads),
        grid=(tokens // tiles.queries, heads),
        in_specs=[whole] * 8,
        out_specs=[whole] * 3,
        out_shape=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in carry_HxT],
        input_output_aliases={5: 0, 6: 1, 7: 2},
        compiler_params=plgpu.CompilerParams(num_warps=4 if head_dim <= 64 else 8, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * tiles.queries * tiles.keys * head_dim,
            transcendentals=pairs * tiles.queries * tiles.keys,
            bytes_accessed=heads * tokens * (head_dim * (itemsize + 8) + 16)
            + 2 * pairs * tiles.keys * head_dim * itemsize,
        ),
        interpret=interpret,
        name="striped_attention",
    )(
        jnp.stack([shift, used]).astype(jnp.int32),
        first_T,
        q_HxTxD,
        k_GxTxD,
        v_GxTxD,
        *carry_HxT,
    )
    return Carry(m, l, o)


def _kernel(
    scalar_ref: Any,
    first_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    m_ref: Any,
    l_ref: Any,
    o_ref: Any,
    m_out: Any,
    l_out: Any,
    o_out: Any,
    *,
    scores: Scores,
    tiles: Tiles,
    group: int,
) -> None:
    head = pl.program_id(1)
    at = pl.program_id(0) * tiles.queries
    rows = pl.ds(at, tiles.queries)
    shift, used = scalar_ref[0], scalar_ref[1]
    first_Q = first_ref[rows]
    last_Q = jnp.minimum(at + jnp.arange(tiles.queries, dtype=jnp.int32) - shift, used - 1)
    bounds = key_tiles(first_Q, last_Q, tiles.keys)
    q_QxD = q_ref[head, rows, :]
    dot = partial(
        lax.dot_general,
        precision=precision_of(q_QxD.dtype),
        preferred_element_type=jnp.float32,
    )

    def fold(j: jax.Array, carry: _Running, *, masked: bool) -> _Running:
        m_Qx1, l_Qx1, o_QxD = carry
        at_key = j * tiles.keys
        keys = (head // group, pl.ds(at_key, tiles.keys))
        k_KxD, v_KxD = k_ref[*keys, :], v_ref[*keys, :]
        s_QxK = scores.of(dot(q_QxD, k_KxD, (((1,), (1,)), ((), ()))))
        if masked:
            key_K = at_key + jnp.arange(tiles.keys, dtype=jnp.int32)
            visible = (key_K >= first_Q[:, None]) & (key_K <= last_Q[:, None])
            s_QxK = jnp.where(visible, s_QxK, -jnp.inf)
            # What lies beyond the stripe's end may be NaN, and 0 times NaN is NaN.
            v_KxD = jnp.where((key_K < used)[:, None], v_KxD, 0)
        weights = fold_scores(m_Qx1, s_QxK, axis=1)
        pv_QxD = dot(weights.p.astype(v_KxD.dtype), v_KxD, (((1,), (0,)), ((), ())))
        return (
            weights.m,
            l_Qx1 * weights.shrink + weights.p.sum(1, keepdims=True),
            o_QxD * weights.shrink + pv_QxD,
        )

    masked, unmasked = partial(fold, masked=True), partial(fold, masked=False)
    carry = (m_ref[head, rows][:, None] * LOG2_E, l_ref[head, rows][:, None], o_ref[head, rows, :])
    carry = lax.fori_loop(bounds.first, bounds.inner, masked, carry)
    carry = lax.fori_loop(bounds.inner, bounds.diagonal, unmasked, carry)
    m_Qx1, l_Qx1, o_QxD = lax.fori_loop(bounds.diagonal, bounds.end, masked, carry)

    # Untouched where nothing was seen: converting there and back would round.
    @pl.when(bounds.first < bounds.end)
    def store() -> None:
        m_out[head, rows] = (m_Qx1 * LN_2).reshape(tiles.queries)
        l_out[head, rows] = l_Qx1.reshape(tiles.queries)
        o_out[head, rows, :] = o_QxD
