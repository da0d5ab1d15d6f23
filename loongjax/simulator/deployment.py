"""What is simulated: how many instances of what, with how much memory, and how fast.

`deploy` resolves what `--hardware`, `--model-shape` and the options beside them say: a cost
model that was calibrated on measurements where loongjax ships one, else an estimate from the
data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from loongjax.cluster.topology import EverySubset, default_topology
from loongjax.costmodel.analytic import analytic_sib, least_tensor_parallel
from loongjax.costmodel.calibrated import calibrated_sib
from loongjax.costmodel.hardware import HardwareDescription, hardware_names, load_hardware
from loongjax.costmodel.sib import HostTime, ScalingInformationBase
from loongjax.errors import ConfigError
from loongjax.executor.protocol import ExecutorLimits
from loongjax.models.config import ModelConfig
from loongjax.models.random_weights import random_config
from loongjax.models.weights import check_tensor_parallel
from loongjax.plan import Topology
from loongjax.scheduler.policies import Layout
from loongjax.simulator.jobs import Job

_MAX_ROWS = 1024
_ITEMSIZE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """A simulated cluster.

    Attributes:
      name: How it was asked for.
      topology: The groups that exist.
      pool_slots: KV tokens of each instance.
      block_size: Tokens per block.
      limits: What one step may hold.
      cost: How long steps take.
      reference: The cost model of the hardware's usual deployment, and `reference_degree` its
        largest group: what an objective may call the time of a request alone. So objectives
        do not change with the number and kind of instances.
      kv_bytes_per_token: Bytes of KV of one token.
    """

    name: str
    topology: Topology
    pool_slots: int
    block_size: int
    limits: ExecutorLimits
    cost: ScalingInformationBase
    reference: ScalingInformationBase
    reference_degree: int
    kv_bytes_per_token: int

    @property
    def instances(self) -> int:
        """How many there are."""
        return self.topology.instances

    @property
    def capacity(self) -> int:
        """KV tokens that the largest group holds."""
        return max(self.topology.degrees) * (self.pool_slots // self.block_size * self.block_size)

    def refusal(self, job: Job) -> str | None:
        """Why a job can never run: it needs more than the largest group holds. None: it can."""
        peak = job.prompt + job.limit - 1
        needed = -(-peak // self.block_size) * self.block_size
        if needed <= self.capacity:
            return None
        return (
            f"prompt {job.prompt} + limit {job.limit} need {needed} KV slots; the largest group "
            f"has {self.capacity}"
        )


def deploy(
    hardware: str,
    model_shape: str,
    *,
    instances: int | None = None,
    tensor_parallel: int | None = None,
    pool_slots: int | None = None,
    block_size: int = 16,
    max_chunk_tokens: int | None = None,
    every_subset: bool = False,
    layout: Layout = "usual",
    host: HostTime | None = None,
) -> Deployment:
    """Resolves a deployment.

    Args:
      hardware: `NAMExCHIPS`, such as `a800x8`; or the path of a cost model (`.json`) that was
        measured, which needs `instances`.
      model_shape: One of the named shapes of random models.
      instances: None: as many as the chips make.
      tensor_parallel: Chips of an instance. None: as `layout` says; usual is what the hardware's
        description says, else the fewest that hold the weights with as much room for KV.
      pool_slots: KV tokens of an instance. None: as measured, or what memory leaves.
      block_size: Tokens per block.
      max_chunk_tokens: Prompt tokens of a step for each rank. None: as measured, or as many as
        KV fits.
      every_subset: Any instances may form a group, whatever is usual for the platform.
      layout: How the chips are cut if neither `instances` nor `tensor_parallel` is given.
      host: Time of the engine itself. None: that of the cost model.

    Raises:
      ConfigError: Something unknown, missing, or out of range.
      ModelError: An unknown shape.
    """
    model = random_config(model_shape)
    _check_least(tensor_parallel=tensor_parallel, max_chunk_tokens=max_chunk_tokens)
    _check_least(instances=instances, block_size=block_size, pool_slots=pool_slots)
    if hardware.endswith(".json"):
        cost = reference = ScalingInformationBase.load(Path(hardware))
        _check_measured(hardware, cost, model_shape, instances, tensor_parallel)
        count, platform = instances or 0, "cpu"
        reference_degree = count
    else:
        chip, chips = _parse(hardware)
        usual = _usual_tensor_parallel(chip, model, chips)
        if tensor_parallel is None and instances is None:
            parts = {"usual": chips // usual, "one": 1, "halves": 2}[layout]
            tp = max(1, chips // parts)
        else:
            tp = usual if tensor_parallel is None else tensor_parallel
        count = chips // tp if instances is None else instances
        _check_chips(hardware, chips, count, tp)
        if tensor_parallel is not None:
            check_tensor_parallel(model, tp)
        cost = _sib(chip, model, model_shape, tp, count)
        reference_degree = max(1, chips // usual)
        reference = _sib(chip, model, model_shape, usual, reference_degree)
        platform = chip.platform
    cost = cost if host is None else replace(cost, host=host)
    slots = cost.pool_slots if pool_slots is None else pool_slots
    if slots is None or slots < block_size:
        raise ConfigError(
            f"an instance has {slots} KV slots in blocks of {block_size}; it needs at least one "
            "block. Say --pool-slots"
        )
    padding = cost.padding
    chunk, rows = (slots, _MAX_ROWS) if padding is None else (padding.chunks[-1], padding.rows[-1])
    if max_chunk_tokens is not None:
        chunk = max_chunk_tokens
    return Deployment(
        name=hardware,
        topology=EverySubset(count) if every_subset else default_topology(platform, count),
        pool_slots=slots,
        block_size=block_size,
        limits=ExecutorLimits(max_chunk_tokens=chunk, max_rows=rows, steps_ahead=1),
        cost=cost,
        reference=reference,
        reference_degree=reference_degree,
        kv_bytes_per_token=model.kv_bytes_per_token(_ITEMSIZE),
    )


def _check_least(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {number}")


def _parse(hardware: str) -> tuple[HardwareDescription, int]:
    name, _, number = hardware.rpartition("x")
    if not name or not number.isdigit() or int(number) < 1:
        raise ConfigError(
            f"hardware {hardware!r} is not a name and a number of chips, such as a800x8; known "
            f"names are {', '.join(hardware_names())}"
        )
    return load_hardware(name), int(number)


def _usual_tensor_parallel(chip: HardwareDescription, model: ModelConfig, chips: int) -> int:
    """At most as many chips as there are."""
    least = least_tensor_parallel(chip, model)
    return min(chips, max(least, chip.tensor_parallel or least))


def _sib(
    chip: HardwareDescription, model: ModelConfig, shape: str, tensor_parallel: int, count: int
) -> ScalingInformationBase:
    found = calibrated_sib(chip.name, shape, tensor_parallel)
    if found is not None:
        return found
    return analytic_sib(
        chip,
        model,
        model_name=shape,
        tensor_parallel=tensor_parallel,
        degrees=range(1, count + 1),
    )


def _check_chips(hardware: str, chips: int, instances: int, tensor_parallel: int) -> None:
    if not 0 < instances * tensor_parallel <= chips:
        raise ConfigError(
            f"{instances} instances of {tensor_parallel} chips each do not fit {hardware}, which "
            f"has {chips}. Lower --instances or --tensor-parallel, to at least 1"
        )


def _check_measured(
    path: str,
    cost: ScalingInformationBase,
    shape: str,
    instances: int | None,
    tensor_parallel: int | None,
) -> None:
    """What a measured cost model is of must agree with what is asked for."""
    if instances is None:
        raise ConfigError(f"with the cost model {path}, say how many --instances there are")
    made_for = cost.fingerprint
    wanted = tensor_parallel or made_for.tensor_parallel
    if not made_for.model.endswith(shape) or made_for.tensor_parallel != wanted:
        raise ConfigError(
            f"the cost model {path} is of {made_for.model} with tensor parallelism "
            f"{made_for.tensor_parallel}, not of {shape} with {wanted}; measure that with "
            "`loongjax profile`"
        )
