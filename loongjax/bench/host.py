"""What a decode step costs the host: the engine's thread by phase, and detokenizing.

The device's time does not count, nor does the time inside the executable's call, which stands
beside it together with that of a bare loop of the same calls. Times are of the thread's
processor, so that a busy machine shows little, and means over steps: with a step ahead, two
may be launched between one result and the next, and then none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding

from loongjax.api.llm import LLM
from loongjax.cluster.topology import EverySubset
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.engine import Engine, Event, FinishedEvent, GenerationRequest
from loongjax.errors import ConfigError
from loongjax.executor.create import create_executor
from loongjax.executor.host_time import PHASES, Phase
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.kvcache import BlockAllocator
from loongjax.kvcache.pool import KVPool
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.plan import DecodeRow, DecodeStep, Group
from loongjax.programs.build import ROW_SPEC
from loongjax.programs.library import ProgramLibrary
from loongjax.programs.spec import ProgramSpec
from loongjax.sampling.fields import SAID
from loongjax.sampling.params import SamplingParams
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.text import IncrementalDetokenizer, Tokenizer

_SKIPPED = 4
"""Steps at the start that do not count: the first ones are planned, not continued."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTimeReport:
    """Means over decode steps, in microseconds of processor time.

    Attributes:
      rows: Requests in each step.
      context: Tokens of each prompt.
      steps: How many were measured.
      phases: Of the engine's thread, as in `loongjax.executor.host_time`, without `call`; and
        `detokenizing` of all rows, in the threads of the callers.
      call_us: Inside the executable's call.
      bare_call_us: The same calls in a loop that does nothing else; None where the executor
        has no programs.
    """

    rows: int
    context: int
    steps: int
    phases: dict[str, float]
    call_us: float
    bare_call_us: float | None

    @property
    def host_us(self) -> float:
        """The host time of a step: all phases together."""
        return sum(self.phases.values())


def measure_host_time(
    llm: LLM,
    *,
    rows: int,
    context: int,
    steps: int = 100,
    clock: Callable[[], float] = time.thread_time,
) -> HostTimeReport:
    """Lets `rows` requests decode together on an engine that does nothing else.

    Args:
      llm: Its pool must hold `rows * (context + 2 * steps + 100)` tokens, and one more for each
        chunk of all prompts.
      rows: At most what one instance takes in a step.
      context: Tokens of each prompt.
      steps: Decode steps to measure.
      clock: Of the engine's thread [s].

    Raises:
      ConfigError: Too few steps to measure anything.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    engine, host = llm.engine, llm.engine.host_time
    samples: list[dict[Phase, float]] = []
    ended = threading.Event()

    def sample(event: Event) -> None:
        samples.append(host.seconds())
        if isinstance(event, FinishedEvent):
            ended.set()

    before, host.clock = host.clock, clock
    try:
        chunks = rows * -(-context // engine.executor.limits.max_chunk_tokens)  # between which all
        others = [
            engine.submit(_request(f"host-{row}", context, 2 * steps + chunks + 64))
            for row in range(1, rows)
        ]
        # The last to come: when it decodes, all do. Its events are the ticks of the measurement.
        engine.submit(_request("host-0", context, steps + _SKIPPED + 2), on_event=sample)
        ended.wait()
        for handle in others:
            handle.abort()
            for _ in handle:
                pass
        while any(view.busy for view in engine.stats().instances):
            time.sleep(0.01)
    finally:
        host.clock = before
    ticks = samples[_SKIPPED : _SKIPPED + steps + 1]
    found: dict[str, float] = {
        phase: 1e6 * (ticks[-1][phase] - ticks[0][phase]) / (len(ticks) - 1) for phase in PHASES
    }
    call = found.pop("call")
    detokenizing = _detokenizing_us(llm.tokenizer, rows, clock) if llm.tokenizer else 0.0
    return HostTimeReport(
        rows=rows,
        context=context,
        steps=len(ticks) - 1,
        phases={**found, "detokenizing": detokenizing},
        call_us=call,
        bare_call_us=_bare_call_us(engine.executor, rows, clock),
    )


def engine_without_device(*, rows: int, context: int, steps: int = 100) -> LLM:
    """An engine that is whole, but for its programs: they return at once what they are given.

    For the host time at contexts whose KV would take minutes to compute. What it says is
    meaningless.
    """
    length = context + 2 * steps + rows * context // 1024 + 200
    config = EngineConfig(
        cluster=ClusterConfig(instances=1),
        pool=PoolConfig(slots=rows * length),
        max_model_len=length,
        dtype="float32",
    )
    model = replace(random_config("tiny"), max_positions=length)
    executor = create_executor(model, RandomSource(config=model), config)
    shapes = executor.programs.shapes
    executor.programs = _NoPrograms(shapes, executor.memory.meshes, None)
    allocator = BlockAllocator(
        instances=1, slots=executor.pool_slots, block_size=config.pool.block_size
    )
    engine = Engine(
        executor=executor,
        policy=FirstCome(),
        allocator=allocator,
        topology=EverySubset(1),
        vocab_size=model.vocab_size,
        max_model_len=length,
        host_time=executor.host_time,
    )
    return LLM.from_engine(engine)


class _NoPrograms(ProgramLibrary):
    """Programs that give back the pool, and tokens 0."""

    def get(self, spec: ProgramSpec, group: Group) -> Any:
        if (spec, group) not in self._bound:
            sharding = NamedSharding(self._meshes[group], ROW_SPEC)
            said = jax.device_put(np.zeros((spec.degree * spec.rows, SAID), np.int32), sharding)

            def program(*arguments: Any) -> tuple[KVPool, jax.Array]:
                return next(one for one in arguments if isinstance(one, KVPool)), said

            self._bound[spec, group] = cast(jax.stages.Compiled, program)
        return self._bound[spec, group]


def _request(name: str, context: int, tokens: int) -> GenerationRequest:
    prompt = np.random.default_rng(len(name)).integers(0, 256, context).tolist()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return GenerationRequest(id=name, token_ids=tuple(prompt), params=params)


def _detokenizing_us(tokenizer: Tokenizer, rows: int, clock: Callable[[], float]) -> float:
    """One token for each of `rows` answers."""
    answers = [IncrementalDetokenizer(tokenizer) for _ in range(rows)]
    times = []
    for number in range(50):
        begin = clock()
        for row, answer in enumerate(answers):
            answer.push([(number + row) % 256])
        times.append(clock() - begin)
    return 1e6 * median(times)


def _bare_call_us(executor: Any, rows: int, clock: Callable[[], float]) -> float | None:
    """Calls a decode program as the engine does, each while the one before runs."""
    if not isinstance(executor, JaxExecutor) or isinstance(executor.programs, _NoPrograms):
        return None
    group = (0,)
    step = DecodeStep(seq=0, group=group, rows=tuple(DecodeRow(str(i), 0, 0) for i in range(rows)))
    spec = executor.spec_for(step)
    program, weights = executor.programs.get(spec, group), executor.memory.weights_of(group)
    meta = np.zeros((1, spec.layout.size), np.int32)
    spec.layout.of_all_ranks(meta, "write")[:] = executor.pool_slots
    sharding = NamedSharding(executor.memory.meshes[group], ROW_SPEC)
    said = jax.device_put(np.zeros((spec.rows, SAID), np.int32), sharding)
    tables = executor.memory.blank_tables(group, spec.rows)
    pool, times = executor.memory.pool_of(group), []
    for _ in range(50):
        last = said
        begin = clock()
        pool, said = program(weights, pool, meta, tables, last)
        times.append(clock() - begin)
        last.block_until_ready()
    executor.memory.keep_pool(group, pool)
    said.block_until_ready()
    return 1e6 * median(times)
