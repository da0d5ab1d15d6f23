"""From a model's name and a configuration to a cost model on disk."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

from loongjax.cluster.emulation import prepare_devices
from loongjax.config import EngineConfig
from loongjax.costmodel import HostTime
from loongjax.engine import Engine
from loongjax.executor.create import create_executor
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.executor.padding import padding_of
from loongjax.executor.warm_up import warm_up
from loongjax.kvcache import BlockAllocator
from loongjax.models.resolve import resolve
from loongjax.profiler.design import Sizes
from loongjax.profiler.fingerprint import fingerprint
from loongjax.profiler.host import measure_host
from loongjax.profiler.log import PointLog
from loongjax.profiler.runner import Runner
from loongjax.profiler.session import OnProgress, Profile, Session
from loongjax.scheduler.policies.first_come import FirstCome

_HOST_ROWS = 8


def profile(model: str, config: EngineConfig, out: Path, on_progress: OnProgress) -> Profile:
    """Measures, and writes the cost model to `out`.

    What was measured stands in `out` with `.part` behind it until all is done; a run that was
    broken off goes on from there.

    Raises:
      ModelError, ConfigError, BackendStartedError, StepError: As for an engine.
    """
    resolved = resolve(model)
    prepare_devices(config.cluster.devices)
    executor = create_executor(resolved.config, resolved.source, config)
    try:
        warm_up(executor, on_progress)
        here = fingerprint(model, executor.programs.shapes, executor.limits.max_chunk_tokens)
        log = PointLog(out.with_name(out.name + ".part"), here)
        basis = f"measured on {date.today().isoformat()} by loongjax profile"
        session = _session(executor, resolved.config.vocab_size, config, log, on_progress)
        found = session.run(here, basis)
    except BaseException:
        executor.close()
        raise
    host = _host(executor, resolved.config.vocab_size, config)
    found = replace(found, sib=replace(found.sib, host=host))
    found.sib.save(out)
    log.remove()
    return found


def _allocator(executor: JaxExecutor, config: EngineConfig) -> BlockAllocator:
    return BlockAllocator(
        instances=config.cluster.instances,
        slots=executor.pool_slots,
        block_size=config.pool.block_size,
    )


def _session(
    executor: JaxExecutor,
    vocab_size: int,
    config: EngineConfig,
    log: PointLog,
    on_progress: OnProgress,
) -> Session:
    catalogue = executor.catalogue
    runner = Runner(
        executor=executor,
        topology=executor.topology,
        allocator=_allocator(executor, config),
        vocab_size=vocab_size,
    )
    sizes = Sizes(padding=padding_of(catalogue), slots=executor.pool_slots)
    return Session(runner, sizes, log, on_progress)


def _host(executor: JaxExecutor, vocab_size: int, config: EngineConfig) -> HostTime:
    """Closes the executor."""
    engine = Engine(
        executor=executor,
        policy=FirstCome(),
        allocator=_allocator(executor, config),
        topology=executor.topology,
        vocab_size=vocab_size,
        max_model_len=executor.pool_slots,
        host_time=executor.host_time,
    )
    with engine:
        return measure_host(engine, min(_HOST_ROWS, executor.limits.max_rows))
