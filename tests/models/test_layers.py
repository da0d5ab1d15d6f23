"""Precision of the parts: what is summed and rounded where."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.models.layers import linear, rms_norm
from tests.models.hf_reference import relative_error


def draw(*shape: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_summed_in_float32_and_rounded_once(dtype, rows):
    x_TxI, w_OxI = draw(rows, 256, dtype=dtype), draw(32, 256, dtype=dtype)
    exact = np.asarray(x_TxI, np.float64) @ np.asarray(w_OxI, np.float64).T
    wide, narrow = linear(x_TxI, w_OxI, out_dtype=jnp.float32), linear(x_TxI, w_OxI)
    assert wide.dtype == jnp.float32
    assert relative_error(wide, exact) < 256 * 2**-24
    assert narrow.dtype == dtype
    np.testing.assert_array_equal(narrow, wide.astype(dtype))


@pytest.mark.parametrize("shape", [(5, 64), (5, 4, 64)])
def test_norms_are_float32_inside(shape):
    x, scale_M = draw(*shape, dtype=jnp.bfloat16), draw(64, dtype=jnp.bfloat16)
    x_f64 = np.asarray(x, np.float64)
    exact = x_f64 / np.sqrt((x_f64**2).mean(-1, keepdims=True) + 1e-5)
    exact = exact * np.asarray(scale_M, np.float64)
    normed = rms_norm(x, scale_M, 1e-5)
    assert normed.dtype == jnp.bfloat16
    # one rounding to 8 bits is off by 2**-8 at most
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=1.01 * 2**-8, atol=1e-30)
