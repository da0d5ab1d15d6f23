"""Every form of a product gives the same numbers; which form is taken depends on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.models import products
from loongjax.models.products import Products, linear, products_for


@pytest.mark.parametrize("form", list(Products))
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("rows", [1, 2, 64, 65, 128])
def test_forms_agree(form, dtype, tolerance, rows):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, 24)), dtype)
    w = jnp.asarray(rng.standard_normal((40, 24)), dtype)
    found = jax.jit(lambda x, w: linear(x, w, products=form))(x, w)
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert found.dtype == x.dtype
    assert np.linalg.norm(np.asarray(found, np.float64) - wanted) <= tolerance * np.linalg.norm(
        wanted
    )


def test_few_rows_multiply_the_weight_from_the_left():
    x, w = jnp.zeros((8, 24)), jnp.zeros((40, 24))
    text = jax.jit(lambda x, w: linear(x, w, products=Products.CPU)).lower(x, w).as_text()
    assert "tensor<40x8xf32>" in text
    text = jax.jit(lambda x, w: linear(x, w)).lower(x, w).as_text()
    assert "tensor<40x8xf32>" not in text


@pytest.mark.parametrize(
    ("flags", "form"),
    [
        ("flags : sse avx2 fma", Products.CPU_FLOAT32),
        ("flags : avx2 avx512_bf16", Products.CPU),
        ("flags : avx2 amx_bf16 amx_tile", Products.CPU),
        ("Features : fp asimd bf16", Products.CPU),
        ("model name : bf16", Products.CPU_FLOAT32),
    ],
)
def test_form_follows_the_cpu(flags, form, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(products, "_CPU_INFO", info)
    products._cpu_multiplies_bf16.cache_clear()
    assert products_for("cpu") is form
    products._cpu_multiplies_bf16.cache_clear()


def test_accelerators_take_the_compilers_product():
    assert products_for("tpu") is products_for("gpu") is Products.NATIVE
