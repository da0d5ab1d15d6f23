"""How a matrix product with a weight is computed: one place for all of them.

Weights are `[out, in]`, as checkpoints store them. Sums are float32 always. On accelerators
the compiler's own product is the best one. On CPU, XLA's depends on the form it is given, by
rows of x (measured, jax 0.10.2, weights of 512 x 1,536 on two cores with AVX2):

  float32   2 to 64 rows: `w @ x.T` is 1.2 to 1.7 times faster than `x @ w.T`. The barrier
            keeps XLA from turning one into the other.
  bfloat16  one row is 15 times slower than two. And on a CPU without bfloat16 products, from
            128 rows on, float32 products of converted operands are 1.5 to 2 times faster; with
            fewer rows the conversion of the weight costs more than it gives.
"""

from __future__ import annotations

from enum import Enum
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_FEW_ROWS = range(2, 65)
_MANY_ROWS = 128
_CPU_INFO = Path("/proc/cpuinfo")
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, arm


class Products(Enum):
    """The form of products with weights, and the type of those in prefill attention."""

    NATIVE = "native"
    CPU = "cpu"
    CPU_FLOAT32 = "cpu_float32"
    """As CPU, with large products of bfloat16 operands in float32."""

    @property
    def widens(self) -> bool:
        """Whether large bfloat16 products are computed in float32."""
        return self is Products.CPU_FLOAT32


def products_for(platform: str) -> Products:
    """The form that is fastest on this machine's platform."""
    if platform != "cpu":
        return Products.NATIVE
    return Products.CPU if _cpu_multiplies_bf16() else Products.CPU_FLOAT32


@cache
def _cpu_multiplies_bf16() -> bool:
    if not _CPU_INFO.exists():
        return False
    lines = _CPU_INFO.read_text().splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not set(_BF16_INSTRUCTIONS).isdisjoint(flags.split())


def linear(
    x_TxI: Float[Array, "T I"],
    w_OxI: Float[Array, "O I"],
    out_dtype: DTypeLike | None = None,
    *,
    products: Products = Products.NATIVE,
) -> Float[Array, "T O"]:
    """Computes x @ w.T, summed in float32; in the dtype of x, unless told otherwise.

    float32 operands are multiplied in full float32: the defaults of TPU (bfloat16) and
    GPU (TF32) would be off by 1e-3.
    """
    dtype, rows = out_dtype or x_TxI.dtype, x_TxI.shape[0]
    if products.widens and rows >= _MANY_ROWS:
        x_TxI, w_OxI = x_TxI.astype(jnp.float32), w_OxI.astype(jnp.float32)
    if products is not Products.NATIVE and w_OxI.dtype == jnp.float32 and rows in _FEW_ROWS:
        return lax.optimization_barrier(_dot(w_OxI, x_TxI)).T.astype(dtype)
    if products is not Products.NATIVE and w_OxI.dtype == jnp.bfloat16 and rows == 1:
        return _dot(jnp.concatenate([x_TxI, x_TxI]), w_OxI)[:1].astype(dtype)
    return _dot(x_TxI, w_OxI).astype(dtype)


def _dot(a_AxI: jax.Array, b_BxI: jax.Array) -> Float[Array, "A B"]:
    return lax.dot_general(
        a_AxI,
        b_BxI,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if b_BxI.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
