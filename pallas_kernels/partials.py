"""Partial attention results: a softmax over some of the keys, ready to be merged.

A partial is `(o, lse)`: the attention output over the keys seen so far, normalised, and
the log of the sum of their exponentiated scores. Partials over disjoint sets of keys
merge to the attention over their union, in any order. A query that saw no key has
`o = 0` and `lse = -inf`, and merges to exactly nothing. Always float32, whatever the
inputs are: a merge adds numbers of very different size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32


class Partial(NamedTuple):
    """Attention over a subset of the keys; leading axes are free."""

    o: Float32[Array, "*rows D"]
    lse: Float32[Array, "*rows"]


class Carry(NamedTuple):
    """A running softmax: scores' maximum `m`, sum `l` of exponentials, weighted sum `o`."""

    m: Float32[Array, "*rows"]
    l: Float32[Array, "*rows"]  # noqa: E741  the letter of every paper on the subject
    o: Float32[Array, "*rows D"]


def empty_carry(rows: tuple[int, ...], head_dim: int) -> Carry:
    """A carry that has seen no key."""
    return Carry(
        m=jnp.full(rows, -jnp.inf, jnp.float32),
        l=jnp.zeros(rows, jnp.float32),
        o=jnp.zeros((*rows, head_dim), jnp.float32),
    )


def bent(scores: Float[Array, "*any"], soft_cap: float | None) -> Float[Array, "*any"]:
    """Scores bent into (-soft_cap, soft_cap) by a tanh; None leaves them."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def fold_weights(
    m_rows: Float32[Array, "*rows"], s_rowsxK: Float32[Array, "*rows K"]
) -> tuple[Float32[Array, "*rows"], Float32[Array, "*rows K"], Float32[Array, "*rows"]]:
    """One step of the running softmax: new maximum, weights of the new keys, and the
    factor by which what was summed before shrinks.

    Masked scores are -inf and get weight 0, also where a row has seen no key at all.
    """
    m_new = jnp.maximum(m_rows, s_rowsxK.max(-1))
    # Subtracting -inf from -inf would give NaN; such rows have only zero weights anyway.
    base = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    return m_new, jnp.exp(s_rowsxK - base[..., None]), jnp.exp(m_rows - base)


def fold_keys(
    carry_HxQ: Carry,
    q_HxQxD: Float[Array, "H Q D"],
    k_GxKxD: Float[Array, "G K D"],
    v_GxKxD: Float[Array, "G K D"],
    visible_QxK: Bool[Array, "Q K"] | None,
    scale: float,
    soft_cap: float | None = None,
) -> Carry:
    """Folds a tile of keys into the running softmax of a tile of queries.

    Query heads h share KV head h // (H // G). Keys that a query does not see have no weight;
    their values must be finite. None: every query sees every key. Products accumulate in
    float32. `soft_cap` as for `bent`.
    """
    heads, queries, head_dim = q_HxQxD.shape
    kv_heads, keys, _ = k_GxKxD.shape
    shared = (kv_heads, heads // kv_heads * queries)  # all queries of a KV head in one product
    s = lax.dot_general(
        q_HxQxD.reshape(*shared, head_dim),
        k_GxKxD,
        (((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    s_HxQxK = bent(s.reshape(heads, queries, keys) * scale, soft_cap)
    if visible_QxK is not None:
        s_HxQxK = jnp.where(visible_QxK, s_HxQxK, -jnp.inf)
    m_HxQ, p_HxQxK, shrink_HxQ = fold_weights(carry_HxQ.m, s_HxQxK)
    pv = lax.dot_general(
        p_HxQxK.reshape(*shared, keys).astype(v_GxKxD.dtype),
        v_GxKxD,
        (((2,), (1,)), ((0,), (0,))),
        preferred_element_type=jnp.float32,
    )
    return Carry(
        m_HxQ,
        carry_HxQ.l * shrink_HxQ + p_HxQxK.sum(-1),
        carry_HxQ.o * shrink_HxQ[..., None] + pv.reshape(heads, queries, head_dim),
    )


def fold_partial(carry: Carry, partial: Partial) -> Carry:
    """Folds a finished partial over other keys into a running softmax."""
    m = jnp.maximum(carry.m, partial.lse)
    base = jnp.where(m == -jnp.inf, 0.0, m)
    old, new = jnp.exp(carry.m - base), jnp.exp(partial.lse - base)
    o = carry.o * old[..., None] + partial.o * new[..., None]
    return Carry(m, carry.l * old + new, o)


def slice_carry(carry_HxT: Carry, at: Int32[Array, ""], size: int) -> Carry:
    """The carry of `size` queries from `at` on."""
    return Carry(*(lax.dynamic_slice_in_dim(leaf, at, size, axis=1) for leaf in carry_HxT))


def put_carry(carry_HxT: Carry, part_HxQ: Carry, at: Int32[Array, ""]) -> Carry:
    """Puts back what `slice_carry` took."""
    pairs = zip(carry_HxT, part_HxQ, strict=True)
    return Carry(*(lax.dynamic_update_slice_in_dim(all_, part, at, axis=1) for all_, part in pairs))


def finish(carry: Carry) -> Partial:
    """Normalises a running softmax."""
    seen = carry.l > 0.0
    divisor = jnp.where(seen, carry.l, 1.0)
    o = jnp.where(seen[..., None], carry.o / divisor[..., None], 0.0)
    lse = jnp.where(seen, carry.m + jnp.log(divisor), -jnp.inf)
    return Partial(o, lse)


def merge(
    o_PxrowsxD: Float32[Array, "parts *rows D"],
    lse_Pxrows: Float32[Array, "parts *rows"],
) -> Partial:
    """Merges P partials over disjoint keys into one."""
    top = lse_Pxrows.max(0)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(lse_Pxrows - base)
    total = weight.sum(0)
    divisor = jnp.where(total > 0.0, total, 1.0)
    o = (o_PxrowsxD * weight[..., None]).sum(0) / divisor[..., None]
    return Partial(o, jnp.where(total > 0.0, base + jnp.log(divisor), -jnp.inf))
