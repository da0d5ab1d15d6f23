"""The KV pool's arrays on the devices: how they are shaped, stored and made.

Each device holds three arrays: K and V `[L, P, G / tp, D]`, whole blocks of slots and one more
for tokens that are not kept, and the block table `[N, 3]` of its instance (see
`pallas_kernels.paged_attention`). They are donated to every step and come back from it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float, Int32, Shaped

from loongjax.cluster.mesh import SP, TP


class KVPool(NamedTuple):
    """The pool of one device, or of a group when its leaves are global arrays.

    Globally the slots of all instances lie behind each other on axis 1, tables on axis 0.
    """

    k: Shaped[Array, "L P G D"]
    v: Shaped[Array, "L P G D"]
    table: Int32[Array, "N 3"]


POOL_LAYOUT = Layout(major_to_minor=(0, 1, 2, 3))
"""How K and V lie in a TPU's memory, where kernels fetch slots: a slot's heads side by side. Left
alone, XLA lays slots in lanes where heads fill those badly, and copies the pool for every kernel.
The price is padding, to 128 numbers a head and to a power of two of heads below 8.
"""

POOL_SPECS = KVPool(
    k=PartitionSpec(None, SP, TP, None),
    v=PartitionSpec(None, SP, TP, None),
    table=PartitionSpec(SP, None),
)


def stored_dtype(dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """The type that KV of `dtype` is stored as.

    On CPU, bf16 is stored as uint16: XLA's CPU compiler would else convert the whole pool to
    float32 and back around every scatter.
    """
    if platform == "cpu" and dtype == jnp.bfloat16:
        return jnp.dtype(jnp.uint16)
    return jnp.dtype(dtype)


def to_stored(rows: Float[Array, "*rows"], pool: Shaped[Array, "..."]) -> Shaped[Array, "*rows"]:
    """Numbers as the pool stores them."""
    if pool.dtype == jnp.uint16:
        return lax.bitcast_convert_type(rows, jnp.uint16)
    return rows.astype(pool.dtype)


def from_stored(rows: Shaped[Array, "*rows"]) -> Float[Array, "*rows"]:
    """What the pool stores as numbers."""
    if rows.dtype == jnp.uint16:
        return lax.bitcast_convert_type(rows, jnp.bfloat16)
    return rows


def padded_slots(slots: int, block_size: int) -> int:
    """P, the slots of the arrays of a pool that is to give out `slots`, of whole blocks.

    From `slots` on there is room for what is not kept.
    """
    return (slots // block_size + 1) * block_size


def new_pool(
    device: jax.Device,
    *,
    layers: int,
    slots: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    table_entries: int,
    layout: Layout | None = None,
) -> KVPool:
    """An empty pool on one device; `kv_heads` are those of the device's tp rank.

    `layout` is that of K and V; None: the platform's own.
    """
    shape = (layers, padded_slots(slots, block_size), kv_heads, head_dim)
    place = device if layout is None else Format(layout, SingleDeviceSharding(device))
    with jax.default_device(device):
        return KVPool(
            k=jax.device_put(jnp.zeros(shape, dtype), place),
            v=jax.device_put(jnp.zeros(shape, dtype), place),
            table=jax.device_put(jnp.zeros((table_entries, 3), jnp.int32), device),
        )
