"""`kv_write` on TPU: chosen tokens into pool slots, in place, by asynchronous copies.

Tokens are taken in runs: where a run's slots follow each other, as those of a stripe that is kept
mostly do, it is one copy; else each of its tokens is one. All copies are in flight together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped

_RUN = 16  # tokens


def kv_write(
    pool: Shaped[Array, "L S1 G D"],
    rows_TxGxD: Shaped[Array, "T G D"],
    slot_T: Int32[Array, " T"],
    *,
    layer: int | Int32[Array, ""],
    interpret: Any = False,
) -> Shaped[Array, "L S1 G D"]:
    """Writes row t to slot `slot_T[t]` of a layer; rows for the last slot are not written.

    The pool is aliased: nothing but the rows moves. Moves 2 * T * G * D stored elements.
    """
    tokens, kv_heads, head_dim = rows_TxGxD.shape
    run = _RUN if tokens % _RUN == 0 else 1
    step_N = jnp.diff(slot_T.reshape(-1, run), axis=1)
    last_N = slot_T.reshape(-1, run)[:, -1]
    whole_N = (step_N == 1).all(1) & (last_N < pool.shape[1] - 1)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_kernel, run=run),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={4: 0},
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * tokens * kv_heads * head_dim * pool.dtype.itemsize,
        ),
        interpret=interpret,
        name="kv_write",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        slot_T,
        whole_N.astype(jnp.int32),
        rows_TxGxD,
        pool,
    )


def _kernel(
    layer_ref: Any,
    slot_ref: Any,
    whole_ref: Any,
    rows_ref: Any,
    pool_in: Any,
    pool_ref: Any,
    semaphore: Any,
    *,
    run: int,
) -> None:
    del pool_in  # the same memory as `pool_ref`
    layer, trash = layer_ref[0], pool_ref.shape[1] - 1

    def copy(token: jax.Array, size: int) -> Any:
        return pltpu.make_async_copy(
            rows_ref.at[pl.ds(token, size)],
            pool_ref.at[layer, pl.ds(slot_ref[token], size)],
            semaphore,
        )

    def for_each_copy(act: Callable[[Any], None]) -> None:
        def of_run(n: jax.Array, _: None) -> None:
            whole = whole_ref[n] == 1

            @pl.when(whole)
            def at_once() -> None:
                act(copy(n * run, run))

            def of_token(t: jax.Array, _: None) -> None:
                @pl.when(jnp.logical_not(whole) & (slot_ref[t] < trash))
                def alone() -> None:
                    act(copy(t, 1))

            lax.fori_loop(n * run, jnp.where(whole, n * run, (n + 1) * run), of_token, None)

        lax.fori_loop(0, whole_ref.shape[0], of_run, None)

    for_each_copy(lambda each: each.start())
    for_each_copy(lambda each: each.wait())
