"""What a decode step costs the host: the engine's thread by phase, and detokenizing.

The device's time does not count, nor does the time inside the executable's call, which stands
beside it together with that of a bare loop of the same calls. Times are of the thread's
processor, so that a busy machine shows little, and means over steps: with a step ahead, two
may be launched between one result and the next, and then none.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding

from loongjax.api.llm import LLM
from loongjax.cluster.topology import EverySubset
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.engine import (
    Engine,
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    RequestHandle,
)
from loongjax.errors import BenchError, ConfigError
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
_TAIL = 4
"""Tokens beyond the last reading: steps that lack the request that is read are launched before its
last tokens are handed out, and are of another size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTimeReport:
    """Means over decode steps, in microseconds of processor time.

    Attributes:
      rows: Requests in each step.
      context: Tokens of each prompt.
      steps: How many were measured.
      phases: Of the engine's thread, as in `loongjax.executor.host_time`, without `call`; and
        `detokenizing` of all rows, in the threads of the callers (a median).
      call_us: Inside the executable's call.
      bare_call_us: The same calls in a loop that does nothing else, their median; None where the
        executor has no programs.
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
      BenchError: A request failed or ended early, or a program was made while time was taken.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    engine = llm.engine
    before, engine.host_time.clock = engine.host_time.clock, clock
    try:
        ticks = _decode_together(engine, rows, context, steps)
    finally:
        engine.host_time.clock = before
    phases = phase_means_us(ticks)
    call_us = phases.pop("call")
    phases["detokenizing"] = _detokenizing_us(llm.tokenizer, rows, clock) if llm.tokenizer else 0.0
    return HostTimeReport(
        rows=rows,
        context=context,
        steps=len(ticks) - 1,
        phases=phases,
        call_us=call_us,
        bare_call_us=_bare_call_us(engine.executor, rows, clock),
    )


def phase_means_us(ticks: Sequence[Mapping[Phase, float]]) -> dict[str, float]:
    """What each phase takes between two ticks in the mean [us].

    `ticks` are at least two readings of `HostTime.seconds`.
    """
    first, last = ticks[0], ticks[-1]
    return {phase: 1e6 * (last[phase] - first[phase]) / (len(ticks) - 1) for phase in PHASES}


def _decode_together(
    engine: Engine, rows: int, context: int, steps: int
) -> list[dict[Phase, float]]:
    """The engine's lap times before and after each of `steps` steps that decode all rows.

    Raises BenchError, as `measure_host_time`.
    """
    ticks: list[dict[Phase, float]] = []
    made: list[int] = []
    ended: queue.SimpleQueue[FinishedEvent] = queue.SimpleQueue()
    wanted = _SKIPPED + steps + 1

    def tick(event: Event) -> None:
        if isinstance(event, FinishedEvent):
            ended.put(event)
            return
        ticks.append(engine.host_time.seconds())
        if len(ticks) in (_SKIPPED + 1, wanted):
            made.append(engine.executor.program_counts.made)

    chunks = rows * -(-context // engine.executor.limits.max_chunk_tokens)  # between which all
    others = [
        engine.submit(_request(row, context, 2 * steps + chunks + 64)) for row in range(1, rows)
    ]
    # The last to come: when it decodes, all do. Its tokens are the ticks of the measurement.
    engine.submit(_request(0, context, wanted + _TAIL), on_event=tick)
    end = ended.get()
    for handle in others:
        handle.abort()
    _check_end(0, end, "length")
    for row, handle in enumerate(others, 1):
        _check_end(row, _end_of(handle), "abort")
    while any(view.busy for view in engine.stats().instances):
        time.sleep(0.01)
    if len(ticks) < wanted:
        raise BenchError(f"{len(ticks)} ticks came of the {wanted} that {steps} steps need")
    if made[0] != made[1]:
        raise BenchError(
            f"{made[1] - made[0]} programs were made while host time was taken; warm up with the "
            "same sizes"
        )
    return ticks[_SKIPPED:wanted]


def _end_of(handle: RequestHandle) -> FinishedEvent:
    return next(event for event in handle if isinstance(event, FinishedEvent))


def _check_end(row: int, event: FinishedEvent, wanted: FinishReason) -> None:
    """Raises BenchError unless the request ended as it was to."""
    if event.reason != wanted:
        raise BenchError(
            f"request host-{row} ended with {event.reason!r} instead of {wanted!r} while host time "
            f"was taken: {event.error or 'it was too short, or something else ended it'}"
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


def _request(row: int, context: int, tokens: int) -> GenerationRequest:
    """Each row has a prompt of its own, so that nothing can be reused."""
    prompt = np.random.default_rng(row).integers(0, 256, context).tolist()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return GenerationRequest(id=f"host-{row}", token_ids=tuple(prompt), params=params)


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
