"""From a model and a configuration to a JAX executor: devices, memory, programs' shapes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.cluster.mesh import DeviceGrid, GroupMeshes, device_grid
from loongjax.cluster.topology import default_topology
from loongjax.config import EngineConfig
from loongjax.errors import ConfigError
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.executor.memory import (
    QUANTUM,
    MemoryPlan,
    Room,
    free_bytes,
    given_slots,
    wanted_on_cpu,
)
from loongjax.executor.sizing import size_pool
from loongjax.kvcache.pool import stored_dtype
from loongjax.kvcache.tables import ENTRIES_PER_BLOCK, BlockTable
from loongjax.models.config import ModelConfig
from loongjax.models.placement import place_weights, stacks_layers
from loongjax.models.products import products_for
from loongjax.models.weights import WeightSource, weight_leaves
from loongjax.programs.buckets import MIN_CHUNK_TOKENS
from loongjax.programs.build import ProgramShapes
from loongjax.programs.catalogue import Catalogue, compiled_per_group
from loongjax.programs.folder import default_folder
from loongjax.programs.guard import CompileGuard
from loongjax.programs.store import ProgramStore
from pallas_kernels.backend_names import Backend
from pallas_kernels.backends import default_backend, unsupported
from pallas_kernels.paged_attention import chunk_entries

_log = logging.getLogger(__name__)
_MAX_ROWS = 32
_TABLE_ROW_BYTES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorPlan:
    """An executor as it would be made: everything but the weights, the pool and programs."""

    grid: DeviceGrid
    shapes: ProgramShapes
    catalogue: Catalogue
    memory: MemoryPlan
    store: ProgramStore


def plan_executor(model: ModelConfig, config: EngineConfig) -> ExecutorPlan:
    """Decides all sizes. On accelerators the first time takes two compilations.

    Raises ConfigError where devices, heads or memory do not fit what was asked for.
    """
    cluster, pool = config.cluster, config.pool
    platform = jax.default_backend()
    topology = default_topology(platform, cluster.instances, cluster.degrees)
    grid = device_grid(cluster.instances, cluster.tensor_parallel)
    dtype = jnp.dtype(config.dtype or ("float32" if platform == "cpu" else "bfloat16"))
    max_model_len = config.max_model_len or model.max_positions
    chunk_tokens = min(config.max_chunk_tokens, max_model_len)
    catalogue = Catalogue(
        topology,
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
        block_size=pool.block_size,
        table_entries=_table_entries(QUANTUM, pool.block_size),
        attention_backend=_backend(config, platform, model, dtype),
    )
    store = ProgramStore(config.program_dir or default_folder(), config.trusted_program_dir)
    room = _room(shapes, grid, max_model_len)
    memory = (
        size_pool(room, shapes, catalogue, GroupMeshes(grid), store)
        if pool.slots is None
        else given_slots(room, pool.slots)
    )
    slots = memory.slots
    return ExecutorPlan(
        grid=grid,
        shapes=replace(shapes, slots=slots, table_entries=_table_entries(slots, pool.block_size)),
        catalogue=catalogue,
        memory=memory,
        store=store,
    )


def create_executor(model: ModelConfig, source: WeightSource, config: EngineConfig) -> JaxExecutor:
    """Places the weights and makes the pool.

    Raises ConfigError as `plan_executor`, and ModelError where the source cannot be read.
    """
    plan = plan_executor(model, config)
    shapes, catalogue = plan.shapes, plan.catalogue
    _log.info(
        "%d instances of %d %s device(s), %d KV slots each (%s), %s, %s kernels, degrees %s, "
        "%d programs",
        *(len(plan.grid), shapes.tp, plan.grid[0][0].platform, shapes.slots, plan.memory.origin),
        *(shapes.dtype, shapes.attention_backend, catalogue.topology.degrees),
        len(catalogue.specs),
    )
    weights = place_weights(model, source, plan.grid, shapes.dtype, stacked=shapes.stacked)
    return JaxExecutor(
        weights=weights,
        shapes=shapes,
        grid=plan.grid,
        catalogue=catalogue,
        store=plan.store,
        guard=CompileGuard(strict=config.strict_programs),
    )


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


def _room(shapes: ProgramShapes, grid: DeviceGrid, max_model_len: int) -> Room:
    """The memory of one device, the fullest."""
    devices = [device for row in grid for device in row]
    on_cpu = devices[0].platform == "cpu"
    leaves = jax.tree.leaves(weight_leaves(shapes.config, shapes.tp, stacked=shapes.stacked))
    elements = sum(math.prod(leaf.shard_shape(shapes.tp)) for leaf in leaves)
    weight_bytes = elements * shapes.dtype.itemsize
    kv_bytes = shapes.config.kv_bytes_per_token(np.dtype(shapes.stored_dtype).itemsize)
    table_bytes = _TABLE_ROW_BYTES * BlockTable.required_capacity(1)
    return Room(
        available_bytes=min(free_bytes(device, len(devices)) for device in devices),
        # Emulated devices share one copy (`loongjax.models.placement`).
        weight_bytes=weight_bytes // len(grid) if on_cpu else weight_bytes,
        slot_bytes=kv_bytes // shapes.tp + -(-table_bytes // shapes.block_size),
        wanted=wanted_on_cpu(len(grid), max_model_len) if on_cpu else None,
    )
