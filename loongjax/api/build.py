"""From a model's name and a configuration to a running engine: the one place of assembly.

The executor's module is imported here and late, since it imports jax, and since jax must
know how many devices to emulate before it starts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from loongjax.api.progress import progress_bar
from loongjax.config import EngineConfig
from loongjax.costmodel import CorrectedCost, ScalingInformationBase
from loongjax.costmodel.analytic import analytic_sib
from loongjax.costmodel.hardware import hardware_of, load_hardware
from loongjax.engine import Engine
from loongjax.errors import ConfigError
from loongjax.executor.host_time import HostTime
from loongjax.executor.protocol import Executor
from loongjax.kvcache import BlockAllocator
from loongjax.models.config import ModelConfig
from loongjax.models.resolve import ResolvedModel, resolve
from loongjax.plan import Topology
from loongjax.scheduler.learning import Learning
from loongjax.scheduler.policies import create_policy, needs_cost
from loongjax.scheduler.policy import Policy
from loongjax.text import AnswerText, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from loongjax.executor.create import ExecutorPlan
    from loongjax.programs.catalogue import Catalogue
    from loongjax.programs.library import ProgramLibrary


_log = logging.getLogger(__name__)

_BOUND = 2.0
_ESTIMATE_BOUND = 16.0
"""Factor by which measured and estimated times may be corrected while they are used."""


@runtime_checkable
class DeviceExecutor(Executor, Protocol):
    """An executor that sized its own pool and knows its hardware."""

    @property
    def topology(self) -> Topology:
        """The groups that it can run."""
        ...

    @property
    def host_time(self) -> HostTime:
        """What it shares with the engine whose thread calls it."""
        ...

    @property
    def pool_slots(self) -> int:
        """KV tokens that each instance holds."""
        ...

    @property
    def catalogue(self) -> Catalogue:
        """The programs, by their sizes."""
        ...

    @property
    def programs(self) -> ProgramLibrary:
        """What they have in common, and where they come from."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """A running engine and what its users need beside it.

    Attributes:
      engine: The engine.
      model: The model's shape.
      tokenizer: None if the model has none.
      config: What was asked for.
      cost: How long steps take, as it was measured or estimated before the engine began.
    """

    engine: Engine
    model: ModelConfig
    tokenizer: Tokenizer | None
    config: EngineConfig
    cost: ScalingInformationBase


def build_engine(model: str, config: EngineConfig, policy: Policy | None = None) -> BuiltEngine:
    """Resolves and loads a model, and starts an engine on it.

    `policy` decides what runs where; None: the one that `config` names.

    Raises:
      ModelError: The model cannot be found or read.
      ConfigError: The configuration does not fit the model or the devices, or its cost model is
        of others.
      BackendStartedError: jax runs already, with too few devices.
      StepError: Warm-up failed.
    """
    resolved = resolve(model)
    check_policy(config, resolved.config)
    _check_max_model_len(config, resolved.config)
    tokenizer = load_tokenizer(resolved.tokenizer)
    executor = _create_executor(resolved, config)
    try:
        cost = _cost(model, config, resolved.config, executor)
        policy = policy or make_policy(config.policy, cost)
        topology = executor.topology
        allocator = BlockAllocator(
            instances=config.cluster.instances,
            slots=executor.pool_slots,
            block_size=config.pool.block_size,
        )
        group_slots = max(topology.degrees) * allocator.usable
        engine = Engine(
            executor=executor,
            policy=policy,
            allocator=allocator,
            topology=topology,
            vocab_size=resolved.config.vocab_size,
            # An answer's last token has no KV.
            max_model_len=config.max_model_len
            or min(resolved.config.max_positions, group_slots + 1),
            host_time=executor.host_time,
            watch=None if tokenizer is None else partial(AnswerText, tokenizer),
            kept_steps=config.kept_steps,
            eos_ids={*resolved.config.eos_ids, *(tokenizer.eos_ids if tokenizer else ())},
        )
    except BaseException:
        executor.close()
        raise
    return BuiltEngine(
        engine=engine,
        model=resolved.config,
        tokenizer=tokenizer,
        config=config,
        cost=cost,
    )


def plan_engine(model: str, config: EngineConfig) -> tuple[ModelConfig, ExecutorPlan]:
    """What `build_engine` would build, without weights, pool and programs.

    Raises as `build_engine`.
    """
    resolved = resolve(model)
    check_policy(config, resolved.config)
    _check_max_model_len(config, resolved.config)
    from loongjax.cluster.emulation import prepare_devices

    prepare_devices(config.cluster.devices)
    from loongjax.executor.create import plan_executor

    return resolved.config, plan_executor(resolved.config, config)


def check_policy(config: EngineConfig, shape: ModelConfig) -> None:
    """Before weights are loaded: the policy and its settings exist, its cost model can be read.

    Raises:
      ConfigError: One or the other is not so.
    """
    if config.cost_model is not None:
        cost = ScalingInformationBase.load(config.cost_model)
    else:  # of no device in particular: nothing is asked
        cost = analytic_sib(
            load_hardware("cpu"),
            shape,
            model_name="",
            tensor_parallel=1,
            degrees=(1,),
            slots=1,
        )
    create_policy(config.policy, cost)


def make_policy(text: str, cost: ScalingInformationBase) -> Policy:
    """A policy by its name, with a cost model that learns as it serves.

    Args:
      text: The policy; see `create_policy`.
      cost: What it asks how long steps take, if it does. An estimate may be far off, and so may be
        corrected by more than what was measured.

    Raises:
      ConfigError: There is no such policy or setting.
    """
    if not needs_cost(text):
        return create_policy(text, None)
    bound = _ESTIMATE_BOUND if cost.is_estimate else _BOUND
    corrected = CorrectedCost(cost, bound=bound)
    return Learning(create_policy(text, corrected), corrected)


def _cost(
    model: str, config: EngineConfig, shape: ModelConfig, executor: DeviceExecutor
) -> ScalingInformationBase:
    """How long steps take here: as measured, or by what is publicly known of the devices."""
    import jax

    from loongjax.executor.padding import padding_of

    shapes = executor.programs.shapes
    if config.cost_model is not None:
        from loongjax.profiler.fingerprint import fingerprint

        here = fingerprint(model, shapes, executor.limits.max_chunk_tokens)
        return ScalingInformationBase.load(config.cost_model, expected=here)
    device = jax.devices()[0]
    cost = analytic_sib(
        hardware_of(device.device_kind, device.platform),
        shape,
        model_name=model,
        tensor_parallel=shapes.tp,
        degrees=executor.topology.degrees,
        slots=executor.pool_slots,
        padding=padding_of(executor.catalogue),
    )
    if needs_cost(config.policy):
        _log.info(
            "%s plans with times %s; `loongjax profile` measures them", config.policy, cost.basis
        )
    return cost


def _create_executor(resolved: ResolvedModel, config: EngineConfig) -> DeviceExecutor:
    from loongjax.cluster.emulation import prepare_devices

    prepare_devices(config.cluster.devices)
    from loongjax.executor.create import create_executor
    from loongjax.executor.warm_up import warm_up

    executor = create_executor(resolved.config, resolved.source, config)
    try:
        if config.warm_up:
            with progress_bar("warm-up") as on_progress:
                warm_up(executor, on_progress)
    except BaseException:
        executor.close()
        raise
    return executor


def _check_max_model_len(config: EngineConfig, model: ModelConfig) -> None:
    if config.max_model_len is not None and config.max_model_len > model.max_positions:
        raise ConfigError(
            f"max_model_len {config.max_model_len} exceeds the {model.max_positions} positions "
            "that the model was made for; lower it"
        )
