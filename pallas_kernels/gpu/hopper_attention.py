"""`fold_stripe` for Hopper, through Mosaic GPU: warpgroup products, keys fetched by TMA.

UNCONFIRMED: it compiles for H100, and no GPU has run it; no interpreter runs its products, so its
numbers are unproven, too. It is used where a configuration names it, and nowhere else.

The contract is that of `pallas_kernels.striped_attention.fold_stripe`, but the carry is not folded
in place. A block of the grid folds all keys that a tile of one head's queries can see: a warpgroup
fetches tiles of keys and values, two ahead, and two others fold them into half of the queries each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.causal_tiles import Tiles, causal_pairs, key_tiles
from pallas_kernels.partials import Carry
from pallas_kernels.softmax import LN_2, LOG2_E, Scores

_FOLDERS = 2  # warpgroups that fold; one more fetches
_QUERIES = 64  # of a warpgroup: the rows of its products
_KEYS = 128
_STAGES = 2  # tiles of keys in shared memory
_ROW = plgpu.Layout.WGMMA.reduce(1)

_Running = tuple[jax.Array, jax.Array, jax.Array]  # m, l, o


def tiles_for(tokens: int, head_dim: int, itemsize: int) -> Tiles:
    """The one tiling there is. Raises ValueError for what it does not fit."""
    if itemsize != 2 or head_dim not in (64, 128):
        raise ValueError(
            f"head_dim {head_dim} with {itemsize} bytes per number must be 64 or 128 with 2 bytes"
        )
    tiles = Tiles(_FOLDERS * _QUERIES, _KEYS)
    if tokens % max(tiles):
        raise ValueError(f"a stripe of {tokens} tokens is no multiple of {max(tiles)}")
    return tiles


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

    The carry of queries that see no key stays as it was. Work: 4*H*D flops for each visible
    pair, rounded up to tiles. Raises ValueError as `tiles_for` does.
    """
    heads, tokens, head_dim = q_HxTxD.shape
    kv_heads, itemsize = k_GxTxD.shape[0], q_HxTxD.dtype.itemsize
    tiles = tiles_for(tokens, head_dim, itemsize)
    index_T = jnp.arange(tokens, dtype=jnp.int32)
    last_T = jnp.minimum(index_T - shift, used - 1)
    by_tile = (tokens // tiles.queries, tiles.queries)
    bounds = key_tiles(first_T.reshape(by_tile), last_T.reshape(by_tile), tiles.keys, axis=1)
    # What lies beyond the stripe's end may be NaN, and 0 times NaN is NaN.
    v_GxTxD = jnp.where((index_T < used)[:, None], v_GxTxD, 0)
    pairs = heads * causal_pairs(tokens, tiles)
    fold = pl.kernel(
        partial(_kernel, scores=Scores(scale, soft_cap), group=heads // kv_heads),
        out_type=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in carry_HxT],
        mesh=plgpu.Mesh(
            grid=(heads, by_tile[0]),
            grid_names=("head", "tile"),
            num_threads=_FOLDERS + 1,
            thread_name="warpgroup",
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        cost_estimate=pl.CostEstimate(
            flops=4 * pairs * tiles.queries * tiles.keys * head_dim,
            transcendentals=pairs * tiles.queries * tiles.keys,
            bytes_accessed=heads * tokens * (head_dim * (itemsize + 8) + 16)
            + 2 * pairs * tiles.keys * head_dim * itemsize,
        ),
        name="striped_attention",
    )
    return Carry(*fold(jnp.stack(bounds), first_T, last_T, q_HxTxD, k_GxTxD, v_GxTxD, *carry_HxT))


def _kernel(*refs: Any, scores: Scores, group: int) -> None:
    head_dim = refs[3].shape[-1]
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def shared(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    arrived = plgpu.Barrier(num_barriers=_STAGES)
    folded = plgpu.Barrier(num_arrivals=_FOLDERS, num_barriers=_STAGES)
    pl.run_scoped(
        partial(_in_block, *refs, scores=scores, group=group),
        shared(_FOLDERS, _QUERIES, head_dim),
        shared(_STAGES, _KEYS, head_dim),
        shared(_STAGES, _KEYS, head_dim),
        plgpu.Barrier(num_barriers=_FOLDERS),
        arrived,
        arrived,
        folded,
        folded,
        collective_axes="warpgroup",
    )


def _in_block(
    bounds_ref: Any,
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
    q_shared: Any,
    k_shared: Any,
    v_shared: Any,
    q_arrived: Any,
    k_arrived: Any,
    v_arrived: Any,
    k_folded: Any,
    v_folded: Any,
    *,
    scores: Scores,
    group: int,
) -> None:
    head, tile = lax.axis_index("head"), lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    first, inner, diagonal, end = (bounds_ref[i, tile] for i in range(4))

    @pl.when(warpgroup == _FOLDERS)
    def fetch() -> None:
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(group))

        @pl.loop(0, end - first)
        def _(step: jax.Array) -> None:
            slot = lax.rem(step, jnp.int32(_STAGES))
            keys = pl.ds((first + step) * _KEYS, _KEYS)
            for source, target, arrived, folded in (
                (k_ref, k_shared, k_arrived, k_folded),
                (v_ref, v_shared, v_arrived, v_folded),
            ):

                @pl.when(step >= _STAGES)
                def wait_for_room(folded: Any = folded) -> None:
                    plgpu.barrier_wait(folded.at[slot])

                plgpu.copy_gmem_to_smem(source.at[kv_head, keys], target.at[slot], arrived.at[slot])

    @pl.when(warpgroup < _FOLDERS)
    def fold_all() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = (head, pl.ds((tile * _FOLDERS + warpgroup) * _QUERIES, _QUERIES))
        q_mine = q_shared.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[*rows], q_mine, q_arrived.at[warpgroup])
        plgpu.barrier_wait(q_arrived.at[warpgroup])
        first_Q, last_Q = (_row(ref, rows[1:]) for ref in (first_ref, last_ref))

        def fold(j: jax.Array, carry: _Running, *, masked: bool) -> _Running:
            m_Q, l_Q, o_QxD = carry
            slot = lax.rem(j - first, jnp.int32(_STAGES))

            def times_keys(sum_ref: Any) -> jax.Array:
                plgpu.wgmma(sum_ref, q_mine, plgpu.transpose_ref(k_shared.at[slot], (1, 0)))
                return sum_ref[...]

            plgpu.barrier_wait(k_arrived.at[slot])
            s_QxK = pl.run_scoped(times_keys, plgpu.ACC((_QUERIES, _KEYS), jnp.float32))
            plgpu.barrier_arrive(k_folded.at[slot])
            s_QxK = scores.of(s_QxK)
            if masked:
                key_QxK = j * _KEYS + plgpu.broadcasted_iota(
                    jnp.int32, s_QxK.shape, 1, layout=plgpu.Layout.WGMMA
                )
                visible = (key_QxK >= _wide(first_Q, _KEYS)) & (key_QxK <= _wide(last_Q, _KEYS))
                s_QxK = jnp.where(visible, s_QxK, -jnp.inf)
            m_new_Q = jnp.maximum(m_Q, s_QxK.max(1))
            # Subtracting -inf from -inf would give NaN; such rows have only zero weights anyway.
            base_Q = jnp.maximum(m_new_Q, -1e30)
            shrink_Q = jnp.exp2(m_Q - base_Q)
            p_QxK = jnp.exp2(s_QxK - _wide(base_Q, _KEYS))
            l_Q = l_Q * shrink_Q + p_QxK.sum(1)
            o_QxD = o_QxD * _wide(shrink_Q, o_QxD.shape[1])
            p_QxK = p_QxK.astype(jnp.bfloat16)

            def add_values(sum_ref: Any) -> None:
                plgpu.wgmma(sum_ref, p_QxK, v_shared.at[slot])

            plgpu.barrier_wait(v_arrived.at[slot])
            o_QxD = pl.run_state(add_values)(plgpu.ACC.init(o_QxD))
            plgpu.barrier_arrive(v_folded.at[slot])
            return m_new_Q, l_Q, o_QxD

        m_Q = _row(m_ref, rows)
        o_QxD = plgpu.load(o_ref, rows, layout=plgpu.Layout.WGMMA, optimized=False)
        carry = (m_Q * LOG2_E, _row(l_ref, rows), o_QxD)
        masked, unmasked = partial(fold, masked=True), partial(fold, masked=False)
        carry = lax.fori_loop(first, inner, masked, carry)
        carry = lax.fori_loop(inner, diagonal, unmasked, carry)
        m_new_Q, l_Q, o_QxD = lax.fori_loop(diagonal, end, masked, carry)
        # Where nothing was seen: converting there and back would round.
        m_out[*rows] = jnp.where(first < end, m_new_Q * LN_2, m_Q)
        l_out[*rows] = l_Q
        o_out[*rows] = o_QxD


def _row(ref: Any, at: tuple) -> jax.Array:
    """One number for each query, as it lies beside products."""
    return plgpu.load(ref, at, layout=_ROW, optimized=False)


def _wide(x_Q: jax.Array, size: int) -> jax.Array:
    return lax.broadcast_in_dim(x_Q, (_QUERIES, size), [0])
