"""Attention in float64, how far from it a result may be, and how far the worst one was."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.partials import Partial


def attention(q, k, v, visible, *, scale: float, soft_cap: float | None = None) -> Partial:
    """As `pallas_kernels.reference.attention`, `[tokens, heads, D]`, in float64."""
    repeat = q.shape[1] // k.shape[1]
    used = visible.any(0)[:, None, None]
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(np.where(used, x, 0), repeat, axis=1) for x in (k, v))
    s = np.einsum("thd,khd->thk", q, k) * scale
    if soft_cap is not None:
        s = soft_cap * np.tanh(s / soft_cap)
    s = np.where(visible[:, None, :], s, -np.inf)
    top = s.max(-1, keepdims=True, initial=-1e300)
    p = np.exp(s - top)
    total = p.sum(-1)
    seen = total > 0
    o = np.einsum("thk,khd->thd", p, v) / np.where(seen, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        return Partial(o, np.where(seen, top[..., 0] + np.log(total), -np.inf))


WORST: dict[tuple[str, str, str], float] = {}
"""Largest relative norm error of `o` by kernel, path and dtype, of all tests of this process."""


def error_of(found, wanted, dtype, *, kernel: str, path: str) -> float:
    """The relative norm error of `o`; remembers the worst."""
    o = np.asarray(found.o, np.float64)
    error = float(np.linalg.norm(o - wanted.o) / max(np.linalg.norm(wanted.o), 1e-30))
    of = kernel, path, str(dtype)
    WORST[of] = max(error, WORST.get(of, 0.0))
    return error


def assert_near(found, wanted, dtype, *, kernel: str, path: str) -> None:
    """Relative norm error of `o` below four roundings of a weight to `dtype` (or of the sums, in
    float32), `lse` likewise; rows that see no key exactly nothing.
    """
    o, lse = np.asarray(found.o, np.float64), np.asarray(found.lse, np.float64)
    assert np.isfinite(o).all()
    blind = np.isneginf(wanted.lse)
    np.testing.assert_array_equal(np.isneginf(lse), blind)
    assert not o[blind].any()
    error = error_of(found, wanted, dtype, kernel=kernel, path=path)
    assert error < 4 * max(float(jnp.finfo(dtype).eps) / 2, 2e-7), error
    np.testing.assert_allclose(lse[~blind], wanted.lse[~blind], rtol=2e-6, atol=4e-6)
