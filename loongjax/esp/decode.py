"""Multi-master decoding: the body of a decode program, on one rank.

A request's row stands with its master, which runs its dense layers. In every layer q, k and
v of all new tokens of the group are gathered (small); each rank stores the new KV whose home
it is, and attends all queries against the KV that it holds; the partial results go back to
the masters, which merge them (LoongServe, section 4.2, "multi-master distributed decoding").
The KV of a request may lie on any of the group's instances, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from loongjax.cluster.mesh import SP
from loongjax.esp.history import Window
from loongjax.esp.meta import Meta
from loongjax.esp.partials import return_to_masters
from loongjax.esp.sampling import sample_rows
from loongjax.kvcache.pool import KVPool, from_stored, to_stored
from loongjax.models.decoder import Decoder
from loongjax.sampling.fields import NO_TOKEN
from pallas_kernels.backends import Kernels
from pallas_kernels.paged_attention import RowTables
from pallas_kernels.partials import Partial, merge


@dataclass(frozen=True, kw_only=True)
class PooledAttention:
    """The decoder's attention in a decode step: see `loongjax.models.decoder.Attend`."""

    degree: int
    block_size: int
    meta: Meta
    kernels: Kernels

    def __call__(
        self,
        state: KVPool,
        *,
        layer: int | Int32[Array, ""],
        window: Window,
        q_TxHxD: Float[Array, "R H D"],
        k_TxGxD: Float[Array, "R G D"],
        v_TxGxD: Float[Array, "R G D"],
    ) -> tuple[Float[Array, "R H D"], KVPool]:
        """Stores the new tokens' KV at their homes, and attends all KV of their requests."""
        heads, kv_heads, head_dim = q_TxHxD.shape[1], k_TxGxD.shape[1], q_TxHxD.shape[2]
        scale = head_dim**-0.5
        new_AxXxD = jnp.concatenate([q_TxHxD, k_TxGxD, v_TxGxD], axis=1)
        if self.degree > 1:
            new_AxXxD = lax.all_gather(new_AxXxD, SP, tiled=True)
        stored = to_stored(new_AxXxD[:, heads:], state.k)
        # Written before it is read, though nothing reads it in this step: a read of the
        # older pool that is not ordered before the write would cost a copy of the pool.
        pool = state._replace(
            k=self.kernels.kv_write(state.k, stored[:, :kv_heads], self.meta["write"], layer=layer),
            v=self.kernels.kv_write(state.v, stored[:, kv_heads:], self.meta["write"], layer=layer),
        )
        position_A = self.meta["position"]
        tables = RowTables(
            table_Nx3=pool.table,
            start_R=self.meta["start"],
            entries_R=self.meta["entries"],
            position_R=position_A,
            first_R=jnp.zeros_like(position_A) if window is None else position_A - window + 1,
        )
        local = self.kernels.paged_attention(
            new_AxXxD[:, :heads],
            pool.k,
            pool.v,
            tables,
            layer=layer,
            block_size=self.block_size,
            scale=scale,
            decode=from_stored,
        )
        o, lse = return_to_masters(local, self.degree)
        own = attend_to_self(q_TxHxD, k_TxGxD, v_TxGxD, scale)
        merged = merge(jnp.concatenate([o, own.o[None]]), jnp.concatenate([lse, own.lse[None]]))
        return merged.o.astype(q_TxHxD.dtype), pool


def attend_to_self(
    q_RxHxD: Float[Array, "R H D"],
    k_RxGxD: Float[Array, "R G D"],
    v_RxGxD: Float[Array, "R G D"],
    scale: float,
) -> Partial:
    """The partial of each row's new token: the one key that its master has at hand."""
    repeat = q_RxHxD.shape[1] // k_RxGxD.shape[1]
    k = jnp.repeat(k_RxGxD, repeat, axis=1).astype(jnp.float32)
    v = jnp.repeat(v_RxGxD, repeat, axis=1).astype(jnp.float32)
    return Partial(v, (q_RxHxD.astype(jnp.float32) * k).sum(-1) * scale)


def decode(
    weights: dict,
    pool: KVPool,
    meta: Meta,
    table_Rx2xV: Int32[Array, "R 2 V"],
    previous_RxS: Int32[Array, "R S"],
    *,
    decoder: Decoder,
    degree: int,
    block_size: int,
    kernels: Kernels,
) -> tuple[KVPool, Int32[Array, "R S"]]:
    """One token for each row whose master this rank is; returns the pool and what is said of
    the tokens (`loongjax.esp.sampling`).

    `previous_RxS` is the output of the group's last decode step, which may still be running
    when this step is launched; `source` says which rows take their token from it.
    """
    previous_R = previous_RxS[:, 0]
    rows = previous_R.shape[0]
    previous_A = lax.all_gather(previous_R, SP, tiled=True) if degree > 1 else previous_R
    source = meta["source"]
    token = jnp.where(source >= 0, previous_A[jnp.maximum(source, 0)], meta["token"])
    update = meta["update"]
    pool = pool._replace(
        table=pool.table.at[update[:, 0]].set(update[:, 1:], mode="promise_in_bounds")
    )
    rank = lax.axis_index(SP) if degree > 1 else jnp.int32(0)
    position = lax.dynamic_slice_in_dim(meta["position"], rank * rows, rows)
    attend = PooledAttention(degree=degree, block_size=block_size, meta=meta, kernels=kernels)
    x_RxM, pool = decoder.apply({"params": weights}, token, position, attend, pool)
    # The host has noted the tokens that it knew.
    last_R = jnp.where(source >= 0, token, NO_TOKEN)
    added_RxN = jnp.concatenate([meta["recent"], last_R[:, None]], axis=1)
    said = sample_rows(weights, x_RxM, meta, table_Rx2xV, added_RxN, decoder, tile_rows=rows)
    return pool, said
