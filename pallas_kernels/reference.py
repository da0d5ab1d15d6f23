"""Attention in plain float32, slow and obvious: what the kernels are compared with."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.partials import Partial


def attention(
    q_TxHxD: Float[Array, "T H D"],
    k_KxGxD: Float[Array, "K G D"],
    v_KxGxD: Float[Array, "K G D"],
    visible_TxK: Bool[Array, "T K"],
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Partial:
    """Softmax attention of every query over its visible keys: `(o_TxHxD, lse_TxH)`.

    Scores are bent into (-soft_cap, soft_cap) by a tanh, if given. A query without a visible key
    gives `o = 0`, `lse = -inf`. Keys that nobody sees are not used, even if they are NaN.
    """
    tokens, heads, head_dim = q_TxHxD.shape
    keys, kv_heads, _ = k_KxGxD.shape
    if keys == 0:
        empty = jnp.zeros((tokens, heads, head_dim), jnp.float32)
        return Partial(empty, jnp.full((tokens, heads), -jnp.inf, jnp.float32))
    repeat = heads // kv_heads
    used = visible_TxK.any(0)[:, None, None]
    q = q_TxHxD.astype(jnp.float32)
    k = jnp.repeat(jnp.where(used, k_KxGxD, 0).astype(jnp.float32), repeat, axis=1)
    v = jnp.repeat(jnp.where(used, v_KxGxD, 0).astype(jnp.float32), repeat, axis=1)
    s = jnp.einsum("thd,khd->thk", q, k, precision="highest") * scale
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(visible_TxK[:, None, :], s, -jnp.inf)
    top = s.max(-1, keepdims=True)
    p = jnp.exp(s - jnp.where(top == -jnp.inf, 0.0, top))
    total = p.sum(-1)
    seen = total > 0.0
    divisor = jnp.where(seen, total, 1.0)
    o = jnp.einsum("thk,khd->thd", p, v, precision="highest") / divisor[..., None]
    lse = jnp.where(seen, top[..., 0] + jnp.log(divisor), -jnp.inf)
    return Partial(o, lse)
