"""From a model's name and a configuration to a running engine: the one place of assembly.

The executor's module is imported here and late, since it imports jax, and since jax must
know how many devices to emulate before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from loongjax.api.progress import progress_bar
from loongjax.config import EngineConfig
from loongjax.costmodel import CorrectedCost, ScalingInformationBase
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


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltEngine:
    """A running engine and what its users need beside it."""

    engine: Engine
    model: ModelConfig
    tokenizer: Tokenizer | None
    config: EngineConfig


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
    policy = policy or make_policy(config)
    resolved = resolve(model)
    _check_max_model_len(config, resolved.config)
    tokenizer = load_tokenizer(resolved.tokenizer)
    executor = _create_executor(model, resolved, config)
    try:
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
    )


def plan_engine(model: str, config: EngineConfig) -> tuple[ModelConfig, ExecutorPlan]:
    """What `build_engine` would build, without weights, pool and programs.

    Raises as `build_engine`.
    """
    make_policy(config)
    resolved = resolve(model)
    _check_max_model_len(config, resolved.config)
    from loongjax.cluster.emulation import prepare_devices

    prepare_devices(config.cluster.devices)
    from loongjax.executor.create import plan_executor

    return resolved.config, plan_executor(resolved.config, config)


def make_policy(config: EngineConfig) -> Policy:
    """The policy that a configuration names, with its cost model, which learns as it serves.

    Raises:
      ConfigError: It does not exist, or needs a cost model that is missing or damaged.
    """
    if config.cost_model is not None:
        cost = CorrectedCost(ScalingInformationBase.load(config.cost_model))
        policy = create_policy(config.policy, cost)
        return Learning(policy, cost) if needs_cost(config.policy) else policy
    if needs_cost(config.policy):
        raise ConfigError(
            f"policy {config.policy!r} plans by how long steps take; give a cost_model file, or "
            "use first_come, which needs none"
        )
    return create_policy(config.policy, None)


def _create_executor(model: str, resolved: ResolvedModel, config: EngineConfig) -> DeviceExecutor:
    from loongjax.cluster.emulation import prepare_devices

    prepare_devices(config.cluster.devices)
    from loongjax.executor.create import create_executor
    from loongjax.executor.warm_up import warm_up
    from loongjax.profiler.fingerprint import fingerprint

    executor = create_executor(resolved.config, resolved.source, config)
    try:
        if config.cost_model is not None:
            shapes, limits = executor.programs.shapes, executor.limits
            here = fingerprint(model, shapes, limits.max_chunk_tokens)
            ScalingInformationBase.load(config.cost_model, expected=here)
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
