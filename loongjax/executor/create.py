"""From a model and a configuration to a JAX executor: devices, memory, programs' shapes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import jax

from loongjax.cluster.mesh import DeviceGrid, GroupMeshes, device_grid
from loongjax.config import EngineConfig
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.executor.memory import (
    MemoryPlan,
    Room,
    free_bytes,
    given_slots,
    wanted_on_cpu,
)
from loongjax.executor.program_plan import (
    device_slot_bytes,
    device_weight_bytes,
    plan_programs,
    with_slots,
)
from loongjax.executor.sizing import size_pool
from loongjax.models.config import ModelConfig
from loongjax.models.placement import place_weights
from loongjax.models.weights import WeightSource
from loongjax.programs.build import ProgramShapes
from loongjax.programs.catalogue import Catalogue
from loongjax.programs.folder import default_folder
from loongjax.programs.guard import CompileGuard
from loongjax.programs.store import ProgramStore
from pallas_kernels.tuning import chip_of

_log = logging.getLogger(__name__)


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
    grid = device_grid(cluster.instances, cluster.tensor_parallel)
    programs = plan_programs(model, config, platform, chip_of(grid[0][0].device_kind))
    shapes, catalogue = programs.shapes, programs.catalogue
    store = ProgramStore(config.program_dir or default_folder(), config.trusted_program_dir)
    room = _room(shapes, grid, config.max_model_len or model.max_positions)
    memory = (
        size_pool(room, shapes, catalogue, GroupMeshes(grid), store)
        if pool.slots is None
        else given_slots(room, pool.slots)
    )
    return ExecutorPlan(
        grid=grid,
        shapes=with_slots(shapes, memory.slots),
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


def _room(shapes: ProgramShapes, grid: DeviceGrid, max_model_len: int) -> Room:
    """The memory of one device, the fullest."""
    devices = [device for row in grid for device in row]
    on_cpu = devices[0].platform == "cpu"
    weight_bytes = device_weight_bytes(shapes)
    return Room(
        available_bytes=min(free_bytes(device, len(devices)) for device in devices),
        # Emulated devices share one copy (`loongjax.models.placement`).
        weight_bytes=weight_bytes // len(grid) if on_cpu else weight_bytes,
        slot_bytes=device_slot_bytes(shapes),
        wanted=wanted_on_cpu(len(grid), max_model_len) if on_cpu else None,
    )
