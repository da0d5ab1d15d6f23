"""`kv_write` on GPU: chosen tokens into pool slots, in place, through Triton."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32, Shaped

_TILE_BYTES = 16384  # that a program moves


def kv_write(
    pool: Shaped[Array, "L S1 G D"],
    rows_TxGxD: Shaped[Array, "T G D"],
    slot_T: Int32[Array, " T"],
    *,
    layer: int | Int32[Array, ""],
    interpret: bool = False,
) -> Shaped[Array, "L S1 G D"]:
    """Writes row t to slot `slot_T[t]` of a layer; rows for the last slot are not written.

    The pool is aliased: nothing but the rows moves. D must be a power of two, as Triton wants
    of every shape; else ValueError. Moves 2 * T * G * D stored elements.
    """
    tokens, kv_heads, head_dim = rows_TxGxD.shape
    if head_dim & (head_dim - 1):
        raise ValueError(f"head_dim {head_dim} is no power of two")
    itemsize = pool.dtype.itemsize
    most = max(1, _TILE_BYTES // (head_dim * itemsize))
    tile = min(most, pl.next_power_of_2(tokens))
    whole = pl.BlockSpec()
    return pl.pallas_call(
        partial(_kernel, tile=tile, tokens=tokens),
        grid=(pl.cdiv(tokens, tile), kv_heads),
        in_specs=[whole] * 4,
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * tokens * kv_heads * head_dim * itemsize + 4 * tokens,
        ),
        interpret=interpret,
        name="kv_write",
    )(pool, rows_TxGxD, slot_T, jnp.asarray(layer, jnp.int32).reshape(1))


def _kernel(
    pool_in: Any,
    rows_ref: Any,
    slot_ref: Any,
    layer_ref: Any,
    pool_ref: Any,
    *,
    tile: int,
    tokens: int,
) -> None:
    del pool_in  # the same memory as `pool_ref`
    kv_head, trash = pl.program_id(1), pool_ref.shape[1] - 1
    token_T = pl.program_id(0) * tile + jnp.arange(tile, dtype=jnp.int32)
    here_T = token_T < tokens
    token_T = jnp.where(here_T, token_T, 0)
    slot_T = plgpu.load(slot_ref.at[token_T], mask=here_T, other=trash)
    shape = (tile, pool_ref.shape[3])
    kept_TxD = jnp.broadcast_to((slot_T < trash)[:, None], shape)
    lane_TxD = lax.broadcasted_iota(jnp.int32, shape, 1)
    token_TxD = jnp.broadcast_to(token_T[:, None], shape)
    slot_TxD = jnp.broadcast_to(slot_T[:, None], shape)
    rows_TxD = plgpu.load(rows_ref.at[token_TxD, kv_head, lane_TxD], mask=kept_TxD)
    # Indexed by dimension: Triton's offsets are 64 bits wide where a pool needs it.
    place = (layer_ref[0], slot_TxD, kv_head, lane_TxD)
    plgpu.store(pool_ref.at[place], rows_TxD, mask=kept_TxD)
