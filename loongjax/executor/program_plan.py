"""What programs an engine needs, on whatever platform: decided before any device is touched.

An engine that starts and `loongjax aot`, which compiles for hardware that is not here, both ask
this module, so that they cannot differ.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from loongjax.cluster.topology import default_topology
from loongjax.config import EngineConfig
from loongjax.errors import ConfigError
from loongjax.executor.memory import QUANTUM
from loongjax.kvcache.pool import stored_dtype
from loongjax.kvcache.tables import ENTRIES_PER_BLOCK, BlockTable
from loongjax.models.config import ModelConfig
from loongjax.models.placement import stacks_layers
from loongjax.models.products import products_for
from loongjax.models.weights import weight_leaves
from loongjax.programs.buckets import MIN_CHUNK_TOKENS
from loongjax.programs.build import ProgramShapes
from loongjax.programs.catalogue import Catalogue, compiled_per_group
from pallas_kernels.backend_names import Backend
from pallas_kernels.backends import default_backend, unsupported
from pallas_kernels.paged_attention import chunk_entries

_log = logging.getLogger(__name__)
_MAX_ROWS = 32
_TABLE_ROW_BYTES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramPlan:
    """The programs of an engine.

    Attributes:
      shapes: What they have in common; at first with a nominal pool (see `with_slots`).
      catalogue: Which there are.
    """

    shapes: ProgramShapes
    catalogue: Catalogue


def plan_programs(
    model: ModelConfig, config: EngineConfig, platform: str, chip: str
) -> ProgramPlan:
    """The programs, with a nominal pool of `QUANTUM` slots.

    `chip` is whose tiles kernels use (`pallas_kernels.tuning`), empty for none.

    Raises ConfigError where degrees, heads or kernels do not fit model or platform.
    """
    cluster, block_size = config.cluster, config.pool.block_size
    dtype = jnp.dtype(config.dtype or ("float32" if platform == "cpu" else "bfloat16"))
    chunk_tokens = min(config.max_chunk_tokens, config.max_model_len or model.max_positions)
    catalogue = Catalogue(
        default_topology(platform, cluster.instances, cluster.degrees),
        max_chunk_tokens=chunk_tokens,
        max_rows=_MAX_ROWS,
        placed=compiled_per_group(platform),
    )
    if catalogue.max_chunk_tokens != chunk_tokens:
        _log.info(
            "chunks of %d tokens are rounded up to %d, a compiled size",
            *(chunk_tokens, catalogue.max_chunk_tokens),
        )
    shapes = ProgramShapes(
        config=model,
        tp=cluster.tensor_parallel,
        dtype=dtype,
        stored_dtype=stored_dtype(dtype, platform),
        stacked=stacks_layers(platform),
        products=products_for(platform),
        slots=QUANTUM,
        block_size=block_size,
        table_entries=_table_entries(QUANTUM, block_size),
        attention_backend=_backend(config, platform, model, dtype),
        chip=chip,
    )
    return ProgramPlan(shapes=shapes, catalogue=catalogue)


def with_slots(shapes: ProgramShapes, slots: int) -> ProgramShapes:
    """The same shapes with a pool of `slots` on each instance."""
    return replace(shapes, slots=slots, table_entries=_table_entries(slots, shapes.block_size))


def device_weight_bytes(shapes: ProgramShapes) -> int:
    """What the weights take on each device. Raises ConfigError where tp does not divide them."""
    leaves = jax.tree.leaves(weight_leaves(shapes.config, shapes.tp, stacked=shapes.stacked))
    elements = sum(math.prod(leaf.shard_shape(shapes.tp)) for leaf in leaves)
    return elements * shapes.dtype.itemsize


def device_slot_bytes(shapes: ProgramShapes) -> int:
    """What a KV slot takes on each device, with its part of the block table."""
    kv_bytes = shapes.config.kv_bytes_per_token(jnp.dtype(shapes.stored_dtype).itemsize)
    table_bytes = _TABLE_ROW_BYTES * BlockTable.required_capacity(1)
    return kv_bytes // shapes.tp + -(-table_bytes // shapes.block_size)


def _backend(config: EngineConfig, platform: str, model: ModelConfig, dtype: jnp.dtype) -> Backend:
    """The kernels' backend. Raises ConfigError where it cannot serve the model here."""
    backend = config.attention_backend or default_backend(platform)
    reason = unsupported(
        backend,
        platform=platform,
        head_dim=model.head_dim,
        itemsize=dtype.itemsize,
        chunk_tokens=MIN_CHUNK_TOKENS,
    )
    if reason is not None:
        raise ConfigError(
            f"attention_backend {backend!r} cannot serve this model: {reason}. Choose "
            "attention_backend='xla', which runs everywhere"
        )
    return backend


def _table_entries(slots: int, block_size: int) -> int:
    """Attention reads entries in chunks, and so beyond the end of the last region."""
    blocks = ENTRIES_PER_BLOCK * (slots // block_size)
    return BlockTable.required_capacity(blocks) + chunk_entries(block_size)
