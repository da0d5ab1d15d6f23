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
from jaxtyping import Array, Float32


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
