"""What a server on hardware that is not here would be, and which programs it would need.

Pure: nothing is compiled here. Everything that cannot work is refused here, before an hour of
compiling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from loongjax.aot.targets import Target, target_of
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.costmodel.hardware import HardwareDescription, load_hardware
from loongjax.errors import ConfigError
from loongjax.executor.memory import Room
from loongjax.executor.program_plan import (
    ProgramPlan,
    device_slot_bytes,
    device_weight_bytes,
    plan_programs,
)
from loongjax.models.config import ModelConfig
from loongjax.models.random_weights import random_config
from pallas_kernels.tuning import tunings


@dataclass(frozen=True, kw_only=True, slots=True)
class AotRequest:
    """A server to compile for, in words.

    Attributes:
      target: The chips (`loongjax.aot.targets`).
      model_shape: The model, one of the named shapes of random models.
      tensor_parallel: Chips of an instance; there are as many instances as chips allow.
      degrees: Instances that may work together. None: all that have groups.
      layers: Layers to compile, for a quick look. None: the model's.
      block_size: Tokens per KV block.
      max_chunk_tokens: Prompt tokens that an instance computes in one step at most.
      pool_slots: KV slots of each instance. None: what memory leaves.
      max_model_len: Positions of a request at most. None: the model's own.
      quick: Compile with little effort, for a look at memory and traffic: a quarter of the time on
        TPU, and slower programs, whose hops are not hidden and which are not kept.
    """

    target: str
    model_shape: str
    tensor_parallel: int = 1
    degrees: tuple[int, ...] | None = None
    layers: int | None = None
    block_size: int = 16
    max_chunk_tokens: int = 2048
    pool_slots: int | None = None
    max_model_len: int | None = None
    quick: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AotPlan:
    """A server to compile for, resolved.

    Attributes:
      request: What was asked for.
      target: The chips.
      hardware: What is known of one.
      model: The model, with as many layers as are compiled.
      programs: The programs, with a nominal pool.
      room: The memory of one chip, before programs are compiled.
    """

    request: AotRequest
    target: Target
    hardware: HardwareDescription
    model: ModelConfig
    programs: ProgramPlan
    room: Room

    @property
    def instances(self) -> int:
        """How many there are."""
        return self.programs.catalogue.topology.instances


def plan_aot(request: AotRequest) -> AotPlan:
    """Resolves a request.

    Raises:
      ConfigError: Something unknown, or that does not fit the target: degrees, heads, weights.
      ModelError: An unknown shape.
    """
    target = target_of(request.target)
    hardware = load_hardware(target.chip)
    model = _model(request)
    config = _engine_config(request, target)
    chip = target.chip if target.chip in tunings() else ""  # as a server there finds it
    programs = plan_programs(model, config, hardware.platform, chip)
    weight_bytes = device_weight_bytes(programs.shapes)
    available = int(hardware.hbm_bytes * target.memory_share)
    if weight_bytes >= available:
        raise ConfigError(
            f"{request.model_shape} takes {weight_bytes / 1e9:,.1f} GB of weights on each of the "
            f"{request.tensor_parallel} chips of an instance, and a {hardware.title} has "
            f"{available / 1e9:,.1f} GB for them: give an instance more chips (tensor parallel)"
        )
    return AotPlan(
        request=request,
        target=target,
        hardware=hardware,
        model=model,
        programs=programs,
        room=Room(
            available_bytes=available,
            weight_bytes=weight_bytes,
            slot_bytes=device_slot_bytes(programs.shapes),
        ),
    )


def _model(request: AotRequest) -> ModelConfig:
    model = random_config(request.model_shape)
    if request.layers is None:
        return model
    if not 1 <= request.layers <= model.layers:
        raise ConfigError(
            f"{request.model_shape} has {model.layers} layers, of which 1 to all can be compiled, "
            f"not {request.layers}"
        )
    return replace(model, layers=request.layers, windows=model.windows[: request.layers])


def _engine_config(request: AotRequest, target: Target) -> EngineConfig:
    tp = request.tensor_parallel
    if tp < 1 or target.chips % tp:
        raise ConfigError(
            f"{target.name} has {target.chips} chips, which do not divide into instances of {tp}"
        )
    instances = target.chips // tp
    highest = max(request.degrees or (1,))
    if highest > instances:
        raise ConfigError(
            f"degree {highest} of instances of {tp} chips needs {highest * tp} chips, and "
            f"{target.name} has {target.chips}"
        )
    return EngineConfig(
        cluster=ClusterConfig(
            instances=instances,
            tensor_parallel=tp,
            degrees=None if request.degrees is None else tuple(sorted(set(request.degrees))),
        ),
        pool=PoolConfig(block_size=request.block_size, slots=request.pool_slots),
        max_chunk_tokens=request.max_chunk_tokens,
        max_model_len=request.max_model_len,
    )
