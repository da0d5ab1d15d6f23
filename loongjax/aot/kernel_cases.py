"""The kernels as servers of real models call them: what has to compile for every target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format

from loongjax.kvcache.pool import POOL_LAYOUT
from pallas_kernels.backend_names import Backend
from pallas_kernels.backends import Kernels
from pallas_kernels.causal_tiles import Tiles
from pallas_kernels.paged_attention import RowTables
from pallas_kernels.partials import Carry

_LAYERS = 32
_SLOTS = 20_001

Kernel = Literal["striped_attention", "paged_attention", "kv_write"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCase:
    """A kernel, and the shapes that it is compiled for.

    Attributes:
      kernel: Which one.
      heads, kv_heads, head_dim: Of the attention.
      dtype: Of queries, keys and the pool.
      tokens: Of the stripe, of the rows (queries), or of what is written.
      rows_at_once: Rows that share keys (`paged_attention`).
      block_size: Tokens per block (`paged_attention`).
      soft_cap: Of scores; None leaves them.
      backend: The kernels that it is about; None: those that run on the target by default.
      tiles: Queries and keys of a tile (`striped_attention`); None: the chip's own.
    """

    kernel: Kernel
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    tokens: int = 1024
    rows_at_once: int = 1
    block_size: int = 16
    soft_cap: float | None = None
    backend: Backend | None = None
    tiles: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """A short readable name."""
        heads = f"h{self.heads}-g{self.kv_heads}-d{self.head_dim}"
        blocks = f"-b{self.block_size}" if self.kernel == "paged_attention" else ""
        backend = f"-{self.backend}" if self.backend else ""
        return f"{self.kernel}-{self.dtype}-{heads}-t{self.tokens}{blocks}{backend}"


CASES = (
    KernelCase(kernel="striped_attention"),
    KernelCase(kernel="striped_attention", kv_heads=32, soft_cap=50.0),
    KernelCase(kernel="striped_attention", dtype="float32", heads=9, kv_heads=3, head_dim=64),
    KernelCase(kernel="striped_attention", heads=8, kv_heads=1, head_dim=256, tokens=128),
    KernelCase(kernel="paged_attention", tokens=32),
    KernelCase(kernel="paged_attention", kv_heads=32, tokens=2048, rows_at_once=64),
    KernelCase(
        kernel="paged_attention", dtype="float32", heads=9, kv_heads=3, tokens=8, block_size=1
    ),
    KernelCase(
        kernel="paged_attention", heads=8, kv_heads=1, head_dim=256, tokens=1, block_size=128
    ),
    KernelCase(kernel="kv_write", kv_heads=32),
    KernelCase(kernel="kv_write", dtype="float32", kv_heads=3, head_dim=64, tokens=1),
    KernelCase(kernel="striped_attention", backend="pallas-hopper"),
    KernelCase(
        kernel="striped_attention",
        heads=9,
        kv_heads=3,
        head_dim=64,
        soft_cap=50.0,
        backend="pallas-hopper",
    ),
)


def cases_of(chip: str) -> tuple[KernelCase, ...]:
    """Those that compile for a chip."""
    return tuple(case for case in CASES if case.backend is None or chip == "h100")


_Built = tuple[Callable[..., Any], tuple[int, ...], tuple[Any, ...]]


def build(case: KernelCase, kernels: Kernels) -> _Built:
    """A function that calls the kernel, which of its arguments are donated, and their shapes."""
    builders = {"striped_attention": _striped, "paged_attention": _paged, "kv_write": _write}
    return builders[case.kernel](case, kernels)


def lower(case: KernelCase, kernels: Kernels, device: jax.Device) -> jax.stages.Lowered:
    """Traces and lowers one kernel for one device; what it writes in place is donated."""
    run, donated, shapes = build(case, kernels)
    sharding = jax.sharding.SingleDeviceSharding(device)
    of_pool = sharding if kernels.backend == "xla" else Format(POOL_LAYOUT, sharding)

    def on_device(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        placed = of_pool if shape.shape == pool_shape(case) else sharding
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed)

    result = of_pool if case.kernel == "kv_write" else sharding
    program = jax.jit(run, donate_argnums=donated, out_shardings=result)
    return program.lower(*jax.tree.map(on_device, shapes))


def _int(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _striped(case: KernelCase, kernels: Kernels) -> _Built:
    tiles = {} if case.tiles is None else {"tiles": Tiles(*case.tiles)}

    def run(carry, q, k, v, first, shift, used):  # type: ignore[no-untyped-def]
        return kernels.fold_stripe(
            *(carry, q, k, v, first),
            shift=shift,
            used=used,
            scale=case.head_dim**-0.5,
            soft_cap=case.soft_cap,
            **tiles,
        )

    rows = (case.heads, case.tokens)
    carry = Carry(
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (rows, rows, (*rows, case.head_dim)))
    )
    q, kv = (
        jax.ShapeDtypeStruct((heads, case.tokens, case.head_dim), case.dtype)
        for heads in (case.heads, case.kv_heads)
    )
    return run, (0,), (carry, q, kv, kv, _int(case.tokens), _int(), _int())


def pool_shape(case: KernelCase) -> tuple[int, ...]:
    """`[L, S + 1, G, D]` of the pool that a case reads or writes."""
    return _LAYERS, _SLOTS, case.kv_heads, case.head_dim


def _pool(case: KernelCase) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(pool_shape(case), case.dtype)


def _paged(case: KernelCase, kernels: Kernels) -> _Built:
    def run(q, k, v, rows, layer):  # type: ignore[no-untyped-def]
        return kernels.paged_attention(
            *(q, k, v, rows),
            layer=layer,
            block_size=case.block_size,
            scale=case.head_dim**-0.5,
            soft_cap=case.soft_cap,
            rows_at_once=case.rows_at_once,
        )

    q = jax.ShapeDtypeStruct((case.tokens, case.heads, case.head_dim), case.dtype)
    rows = RowTables(_int(_SLOTS // case.block_size, 3), *[_int(case.tokens)] * 4)
    return run, (), (q, _pool(case), _pool(case), rows, _int())


def _write(case: KernelCase, kernels: Kernels) -> _Built:
    def run(pool, rows, slots, layer):  # type: ignore[no-untyped-def]
        return kernels.kv_write(pool, rows, slots, layer=layer)

    rows = jax.ShapeDtypeStruct((case.tokens, case.kv_heads, case.head_dim), case.dtype)
    return run, (0,), (_pool(case), rows, _int(case.tokens), _int())
