"""Striped ring prefill with retention: the body of a prefill program, on one rank.

Each rank computes Q, K and V of its stripe. K and V travel round the ring; each rank folds
each arriving stripe into its running softmax (striped attention), and writes the tokens
that it was told to keep into its pool as they pass. So any subset of the group can hold the
KV afterwards, in any proportion, at no extra communication (LoongServe, section 4.1,
"proactive scale-down").
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from loongjax.cluster.mesh import SP
from loongjax.esp.history import HistoryAttention, Window
from loongjax.esp.meta import Meta
from loongjax.esp.sampling import sample_rows, score_prompt
from loongjax.kvcache.pool import KVPool, to_stored
from loongjax.models.decoder import Decoder
from pallas_kernels.backends import Kernels
from pallas_kernels.partials import Carry, empty_carry, finish

_SAMPLED_AT_ONCE = 4  # most steps end few prompts


@dataclass(frozen=True, kw_only=True)
class RingAttention:
    """The decoder's attention in a prefill step: see `loongjax.models.decoder.Attend`.

    `widens`: multiply in float32 what comes in bfloat16 (`loongjax.models.products`).
    """

    degree: int
    meta: Meta
    history: HistoryAttention | None
    widens: bool
    kernels: Kernels

    def __call__(
        self,
        state: KVPool,
        *,
        layer: int | Int32[Array, ""],
        window: Window,
        q_TxHxD: Float[Array, "T H D"],
        k_TxGxD: Float[Array, "T G D"],
        v_TxGxD: Float[Array, "T G D"],
    ) -> tuple[Float[Array, "T H D"], KVPool]:
        """Attends a stripe to all stripes of the step, and keeps what was asked for."""
        tokens, heads, head_dim = q_TxHxD.shape
        kv_heads = k_TxGxD.shape[1]
        rank = lax.axis_index(SP) if self.degree > 1 else jnp.int32(0)
        dtype = jnp.float32 if self.widens else q_TxHxD.dtype
        q_HxTxD = q_TxHxD.transpose(1, 0, 2).astype(dtype)
        kv_TxXxD = jnp.concatenate([k_TxGxD, v_TxGxD], axis=1)  # K and V in one hop
        # The first fold is not to begin before what the first hop sends is put together: that hop
        # would have no fold beside it. And what depends on nothing, such as an empty carry, XLA
        # makes for all layers before the first.
        zero, q_HxTxD, kv_TxXxD = lax.optimization_barrier((jnp.float32(0), q_HxTxD, kv_TxXxD))
        carry = Carry(*(each + zero for each in empty_carry((heads, tokens), head_dim)))
        pool = state
        for hop in range(self.degree):
            source = (rank - hop) % self.degree
            last = hop == self.degree - 1
            arriving = kv_TxXxD if last else lax.ppermute(kv_TxXxD, SP, _ring(self.degree))
            stored = to_stored(kv_TxXxD, pool.k)
            keep_T = self.meta["keep"][hop]
            pool = pool._replace(
                k=self.kernels.kv_write(pool.k, stored[:, :kv_heads], keep_T, layer=layer),
                v=self.kernels.kv_write(pool.v, stored[:, kv_heads:], keep_T, layer=layer),
            )
            kv_XxTxD = kv_TxXxD.transpose(1, 0, 2).astype(dtype)
            carry = self.kernels.fold_stripe(
                carry,
                q_HxTxD,
                kv_XxTxD[:kv_heads],
                kv_XxTxD[kv_heads:],
                first_visible(self.meta["first"], window, rank, source, self.degree),
                shift=(rank < source).astype(jnp.int32),
                used=self.meta["used"],
                scale=head_dim**-0.5,
            )
            # Ties each hop and what is kept to the fold beside them. Left alone, XLA lets hops run
            # ahead of the folds that should hide them, and keeps stripes in memory until it stores
            # what is kept of them.
            kv_TxXxD, carry, pool = lax.optimization_barrier((arriving, carry, pool))
        if self.history is not None:
            carry = self.history(carry, q_HxTxD, pool, layer, window)
        return finish(carry).o.transpose(1, 0, 2).astype(q_TxHxD.dtype), pool


def _ring(degree: int) -> list[tuple[int, int]]:
    return [(rank, (rank + 1) % degree) for rank in range(degree)]


def first_visible(
    first_T: Int32[Array, " T"],
    window: Window,
    rank: Int32[Array, ""],
    source: Int32[Array, ""],
    degree: int,
) -> Int32[Array, " T"]:
    """The first local key of stripe `source` that each local query of `rank` may see.

    Query i and key j of one prompt are `degree * (i - j) + rank - source` positions apart,
    and a window of W lets a query see keys less than W positions back.
    """
    if window is None:
        return first_T
    back = (window - 1 - rank + source) // degree
    return jnp.maximum(first_T, jnp.arange(first_T.shape[0], dtype=jnp.int32) - back)


def prefill(
    weights: dict,
    pool: KVPool,
    meta: Meta,
    table_Rx2xV: Int32[Array, "R 2 V"],
    *,
    decoder: Decoder,
    degree: int,
    block_size: int,
    kernels: Kernels,
    with_history: bool,
) -> tuple[KVPool, Int32[Array, "R S"], Int32[Array, "T N"]]:
    """Computes one rank's stripe of a prefill step; returns the pool, and what is said of the
    sampled tokens and of the prompt's (`loongjax.esp.sampling`).

    `with_history` for chunks whose requests have KV in the pool already.

    A row may be sampled on another rank than the one with the prompt's last token: the
    hidden states of those tokens are scattered over the ranks, so that the output
    projection is not done n times.
    """
    history = HistoryAttention(degree=degree, block_size=block_size, meta=meta, kernels=kernels)
    attend = RingAttention(
        degree=degree,
        meta=meta,
        history=history if with_history else None,
        widens=decoder.products.widens,
        kernels=kernels,
    )
    params = {"params": weights}
    x_TxM, pool = decoder.apply(params, meta["token"], meta["position"], attend, pool)
    index_A = meta["sample_index"]
    x_AxM = jnp.where((index_A >= 0)[:, None], x_TxM[jnp.maximum(index_A, 0)], 0)
    if degree > 1:
        x_AxM = lax.psum_scatter(x_AxM, SP, scatter_dimension=0, tiled=True)
    none = jnp.zeros((len(table_Rx2xV), 0), jnp.int32)  # the tables have all tokens
    said = sample_rows(weights, x_AxM, meta, table_Rx2xV, none, decoder, tile_rows=_SAMPLED_AT_ONCE)
    return pool, said, score_prompt(weights, x_TxM, meta, decoder)
