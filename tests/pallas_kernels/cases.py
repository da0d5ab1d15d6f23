"""Random attention inputs, and how far a kernel may be from the reference on them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Normal values, rounded to `dtype`."""
    return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


class Bounds(NamedTuple):
    """Largest absolute errors of a partial result."""

    o: float
    lse: float


def rounding_bounds(q, k, v, *, scale: float) -> Bounds:
    """What rounding alone can do to attention of these inputs, `[tokens, heads, D]`.

    A score is a float32 sum of D products: its error is at most D + 1 roundings of the sum
    of their magnitudes, which Cauchy bounds. An error of a score is a relative error of its
    weight, in numerator and denominator of `o`, and passes unchanged to `lse`. Sums over K
    keys add K roundings. Kernels round weights to the dtype of V, the denominator not. The
    reference rounds as much in float32: all that twice.
    """
    u = float(jnp.finfo(jnp.float32).eps) / 2
    u_weight = float(jnp.finfo(v.dtype).eps) / 2
    norms = [np.linalg.norm(np.asarray(x, np.float32), axis=-1) for x in (q, k)]
    score = scale * norms[0].max(initial=0) * norms[1].max(initial=0)
    score_error = u * (q.shape[-1] + 1) * score
    sum_error = u * len(k)
    lse = 2 * (score_error + sum_error + 4 * u * (1 + score))
    largest = np.abs(np.asarray(v, np.float32)).max(initial=0)
    return Bounds(o=float(2 * lse * largest + u_weight * largest), lse=float(lse))


def assert_close(found, wanted, bounds: Bounds) -> None:
    """Both parts of a partial within their bounds; empty rows exactly."""
    np.testing.assert_allclose(found.o, wanted.o, rtol=0, atol=bounds.o)
    np.testing.assert_allclose(found.lse, wanted.lse, rtol=0, atol=bounds.lse)
    empty = np.isneginf(np.asarray(wanted.lse))
    assert not np.asarray(found.o)[empty].any()
