"""From a model and a configuration to a JAX executor: devices, memory, programs' shapes."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp

from loongjax.cluster.mesh import device_grid
from loongjax.cluster.topology import default_topology
from loongjax.config import EngineConfig
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.executor.memory import default_slots
from loongjax.executor.protocol import ExecutorLimits
from loongjax.kvcache.pool import stored_dtype
from loongjax.kvcache.tables import BlockTable
from loongjax.models.config import ModelConfig
from loongjax.models.placement import place_weights, stacks_layers
from loongjax.models.weights import WeightSource
from loongjax.programs.buckets import chunk_bucket
from loongjax.programs.build import ProgramShapes
from loongjax.programs.store import ProgramStore, default_folder
from pallas_kernels.paged_attention import chunk_entries

_log = logging.getLogger(__name__)
_MAX_ROWS = 32


def create_executor(model: ModelConfig, source: WeightSource, config: EngineConfig) -> JaxExecutor:
    """Places the weights and makes the pool.

    Raises ConfigError where devices, heads or memory do not fit what was asked for, and
    ModelError where the source cannot be read.
    """
    cluster = config.cluster
    platform = jax.default_backend()
    topology = default_topology(platform, cluster.instances, cluster.degrees)
    grid = device_grid(cluster.instances, cluster.tensor_parallel)
    dtype = jnp.dtype(config.dtype or ("float32" if platform == "cpu" else "bfloat16"))
    stacked = stacks_layers(platform)
    weights = place_weights(model, source, grid, dtype, stacked=stacked)
    max_model_len = config.max_model_len or model.max_positions
    slots = config.pool.slots or default_slots(
        list(grid[0]),
        instances=cluster.instances,
        bytes_per_token=model.kv_bytes_per_token(dtype.itemsize) // cluster.tensor_parallel,
        max_model_len=max_model_len,
    )
    block_size = config.pool.block_size
    chunk_tokens = chunk_bucket(min(config.max_chunk_tokens, max_model_len))
    shapes = ProgramShapes(
        config=model,
        tp=cluster.tensor_parallel,
        dtype=dtype,
        stored_dtype=stored_dtype(dtype, platform),
        stacked=stacked,
        slots=slots,
        block_size=block_size,
        # Attention reads entries in chunks, and so beyond the end of the last region.
        table_entries=BlockTable.required_capacity(slots // block_size) + chunk_entries(block_size),
    )
    _log.info(
        "%d instances of %d %s device(s), %d KV slots each, %s, degrees %s, chunks of %d tokens",
        *(cluster.instances, cluster.tensor_parallel, platform, slots, dtype, topology.degrees),
        chunk_tokens,
    )
    return JaxExecutor(
        weights=weights,
        shapes=shapes,
        grid=grid,
        topology=topology,
        limits=ExecutorLimits(max_chunk_tokens=chunk_tokens, max_rows=_MAX_ROWS, steps_ahead=1),
        store=ProgramStore(config.program_dir or default_folder()),
    )
