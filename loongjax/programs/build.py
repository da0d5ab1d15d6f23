"""From a spec to a lowered program: shapes, shardings, and the `shard_map` around a body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loongjax.cluster.mesh import SP, TP
from loongjax.esp.decode import decode
from loongjax.esp.migrate import migrate
from loongjax.esp.prefill import prefill
from loongjax.kvcache.pool import POOL_LAYOUT, POOL_SPECS, KVPool, padded_slots
from loongjax.models.config import ModelConfig
from loongjax.models.decoder import Decoder
from loongjax.models.products import Products
from loongjax.models.weights import LeafSpec, Tree, weight_leaves
from loongjax.programs.spec import ProgramSpec
from loongjax.sampling.fields import SAID
from pallas_kernels.backend_names import Backend
from pallas_kernels.backends import kernels_of

META_SPEC = PartitionSpec(SP, None)
ROW_SPEC = PartitionSpec(SP, None)
TABLE_SPEC = PartitionSpec(SP, None, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramShapes:
    """Everything that all programs of an engine have in common.

    Attributes:
      config: The model.
      tp: Devices of each instance.
      dtype: Of weights and activations.
      stored_dtype: Of KV in the pool.
      stacked: Whether layers are stacked (see `loongjax.models.placement.stacks_layers`).
      products: The form of matrix products (see `loongjax.models.products`).
      slots: KV slots of each instance, without those for what is not kept.
      block_size: Tokens per block.
      table_entries: Rows of each instance's block table.
      attention_backend: Which kernels programs are made of.
      chip: Whose tiles they use (`pallas_kernels.tuning`); empty: those that fit everywhere.
    """

    config: ModelConfig
    tp: int
    dtype: np.dtype
    stored_dtype: np.dtype
    stacked: bool
    products: Products
    slots: int
    block_size: int
    table_entries: int
    attention_backend: Backend = "xla"
    chip: str = ""

    @property
    def logits(self) -> int:
        """Logits of a row: the vocabulary, rounded up to a multiple of `tp`."""
        return -(-self.config.vocab_size // self.tp) * self.tp

    @property
    def pool_layout(self) -> Layout | None:
        """How K and V lie in memory; None: as XLA has it."""
        return POOL_LAYOUT if self.attention_backend == "pallas-tpu" else None

    def pool_shapes(self, degree: int) -> KVPool:
        """Shapes of a group's pool, all its devices together."""
        c = self.config
        kv = (c.layers, degree * padded_slots(self.slots, self.block_size), c.kv_heads, c.head_dim)
        return KVPool(
            k=jax.ShapeDtypeStruct(kv, self.stored_dtype),
            v=jax.ShapeDtypeStruct(kv, self.stored_dtype),
            table=jax.ShapeDtypeStruct((degree * self.table_entries, 3), jnp.int32),
        )


def weight_partition(leaf: LeafSpec) -> PartitionSpec:
    """How a weight lies on a group's mesh: replicated over sp, perhaps cut over tp."""
    axes: list[str | None] = [None] * len(leaf.shape)
    if leaf.tp_axis is not None:
        axes[leaf.tp_axis] = TP
    return PartitionSpec(*axes)


def argument_shapes(spec: ProgramSpec, shapes: ProgramShapes, mesh: Mesh) -> tuple:
    """The program's arguments, shapes and shardings only: weights, pool, meta, the rows' sampling
    tables and, for decode, the output of the group's last decode step.
    """

    def on_mesh(shape: jax.ShapeDtypeStruct, partition: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    leaves = weight_leaves(shapes.config, shapes.tp, stacked=shapes.stacked)
    weights = jax.tree.map(
        lambda leaf: on_mesh(
            jax.ShapeDtypeStruct(leaf.shape, shapes.dtype), weight_partition(leaf)
        ),
        leaves,
    )
    pool = jax.tree.map(on_mesh, shapes.pool_shapes(spec.degree), POOL_SPECS)
    if shapes.pool_layout is not None:
        pool = pool._replace(
            k=_laid_out(pool.k, shapes.pool_layout), v=_laid_out(pool.v, shapes.pool_layout)
        )
    size = spec.layout.size
    meta = on_mesh(jax.ShapeDtypeStruct((spec.degree, size), jnp.int32), META_SPEC)
    if spec.kind == "migrate":
        return pool, meta
    rows = spec.degree * spec.rows
    table = jax.ShapeDtypeStruct((rows, 2, shapes.logits), jnp.int32)
    arguments = weights, pool, meta, on_mesh(table, TABLE_SPEC)
    if spec.kind != "decode":
        return arguments
    said = jax.ShapeDtypeStruct((rows, SAID), jnp.int32)
    return *arguments, on_mesh(said, ROW_SPEC)


def _laid_out(shape: jax.ShapeDtypeStruct, layout: Layout) -> jax.ShapeDtypeStruct:
    placed = Format(layout, shape.sharding)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed)


def lower(spec: ProgramSpec, shapes: ProgramShapes, mesh: Mesh) -> jax.stages.Lowered:
    """Traces and lowers one program; the pool is donated."""
    arguments = argument_shapes(spec, shapes, mesh)
    body = _body(spec, shapes)
    program = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=jax.tree.map(lambda argument: argument.sharding.spec, arguments),
        out_specs=(POOL_SPECS, *[ROW_SPEC] * spec.outputs),
        check_vma=False,  # replication over tp is by construction, not inferred
    )
    options: dict[str, Any] = {"donate_argnums": pool_argument(spec)}
    if shapes.pool_layout is not None:  # else the pool would come back in another layout: a copy
        pool = arguments[pool_argument(spec)]
        formats = KVPool(k=pool.k.format, v=pool.v.format, table=pool.table.sharding)
        rows = NamedSharding(mesh, ROW_SPEC)
        options["out_shardings"] = (formats, *[rows] * spec.outputs)
    return jax.jit(program, **options).lower(*arguments)


def pool_argument(spec: ProgramSpec) -> int:
    """The place of the pool among a program's arguments."""
    return 0 if spec.kind == "migrate" else 1


def _body(spec: ProgramSpec, shapes: ProgramShapes) -> Callable[..., tuple[KVPool, jax.Array]]:
    """What one rank runs, on its own shards."""
    layout, degree = spec.layout, spec.degree
    kernels = kernels_of(shapes.attention_backend, shapes.chip)
    common: dict[str, Any] = {
        "decoder": Decoder(shapes.config, shapes.tp, shapes.products),
        "degree": degree,
        "block_size": shapes.block_size,
        "kernels": kernels,
    }

    def on_rank(weights: Tree, pool: KVPool, meta_1xM: jax.Array, *rest: jax.Array) -> Any:
        meta = layout.views(meta_1xM[0])
        if spec.kind == "decode":
            return decode(weights, pool, meta, *rest, **common)
        return prefill(weights, pool, meta, *rest, **common, with_history=spec.kind == "extend")

    def move(pool: KVPool, meta_1xM: jax.Array) -> Any:
        return migrate(pool, layout.views(meta_1xM[0]), degree=degree, kernels=kernels)

    return move if spec.kind == "migrate" else on_rank
