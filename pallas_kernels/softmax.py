"""The running softmax inside hardware kernels, with scores in units of log 2.

Exponentials of base 2 are what the hardware computes; scaling scores by `log2(e)` on the way
costs nothing, since they are scaled anyway. Carries outside of kernels are natural logarithms
(`pallas_kernels.partials`): `LOG2_E` and `LN_2` convert.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class Scores(NamedTuple):
    """How products of queries and keys become scores.

    Attributes:
      scale: Factor of the products.
      soft_cap: Scores are bent into (-soft_cap, soft_cap) by a tanh; None leaves them.
    """

    scale: float
    soft_cap: float | None = None

    def of(self, products: jax.Array) -> jax.Array:
        """Scores in units of log 2."""
        if self.soft_cap is None:
            return products * (self.scale * LOG2_E)
        bent = jnp.tanh(products * (self.scale / self.soft_cap))
        return bent * (self.soft_cap * LOG2_E)


class Weights(NamedTuple):
    """One step of a running softmax.

    Attributes:
      m: The new maximum.
      p: The weights of the new keys; exactly 0 where the score is -inf.
      shrink: The factor by which what was summed before shrinks.
    """

    m: jax.Array
    p: jax.Array
    shrink: jax.Array


def fold_scores(m: jax.Array, s: jax.Array, *, axis: int) -> Weights:
    """Takes in scores; `m` has size 1 along `axis`, over which `s` has its keys."""
    m_new = jnp.maximum(m, s.max(axis, keepdims=True))
    # -inf minus -inf would be NaN; a row that saw no key has only zero weights anyway.
    base = jnp.where(m_new == -jnp.inf, 0.0, m_new)
    return Weights(m_new, jnp.exp2(s - base), jnp.exp2(m - base))


def precision_of(dtype: jax.typing.DTypeLike) -> lax.Precision:
    """Of products inside kernels: float32 operands are never rounded to fewer bits."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
