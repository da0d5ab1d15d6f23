"""What a kernel has to do at least, and what its grid does: arithmetic and traffic, by counting.

Times are those of a chip's peaks: bfloat16 products, and the bandwidth of its memory. No kernel is
compiled for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from loongjax.aot.kernel_cases import KernelCase, build
from loongjax.costmodel.hardware import HardwareDescription
from pallas_kernels.backends import Kernels, kernels_of

_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Arithmetic, and bytes to and from memory, of one call."""

    flops: int
    bytes: int

    def seconds(self, hardware: HardwareDescription) -> float:
        """The time at the chip's peaks, both at once."""
        return max(self.flops / hardware.flops_per_s, self.bytes / hardware.hbm_bytes_per_s)


def least_work(case: KernelCase) -> Work:
    """What no implementation can do without: visible pairs alone, every array moved once.

    striped_attention: one causal prompt fills the stripe. paged_attention: each of the table's
    keys is seen by the rows of one visit. kv_write: all tokens are kept.
    """
    _, _, shapes = build(case, kernels_of("xla"))
    size = jax.dtypes.canonicalize_dtype(case.dtype).itemsize
    rows = case.tokens * case.heads
    if case.kernel == "striped_attention":
        pairs = case.tokens * (case.tokens + 1) // 2
        carry = 2 * rows * (case.head_dim + 2) * _FLOAT32_BYTES
        moved = (rows + 2 * case.tokens * case.kv_heads) * case.head_dim * size
        return Work(flops=4 * pairs * case.heads * case.head_dim, bytes=carry + moved)
    if case.kernel == "paged_attention":
        keys = shapes[3].table_Nx3.shape[0] * case.block_size
        moved = (rows + 2 * keys * case.kv_heads) * case.head_dim * size
        result = rows * (case.head_dim + 1) * _FLOAT32_BYTES
        pairs = keys * case.rows_at_once
        return Work(flops=4 * pairs * case.heads * case.head_dim, bytes=moved + result)
    return Work(flops=0, bytes=2 * case.tokens * case.kv_heads * case.head_dim * size)


def grid_work(case: KernelCase, kernels: Kernels) -> Work:
    """What the kernel tells the compiler of itself, which is the work of its grid."""
    run, _, shapes = build(case, kernels)
    jaxpr = jax.make_jaxpr(run)(*shapes)
    (call,) = [eqn for eqn in jaxpr.eqns if eqn.params.get("cost_estimate") is not None]
    estimate = call.params["cost_estimate"]
    return Work(flops=estimate.flops, bytes=estimate.bytes_accessed)
