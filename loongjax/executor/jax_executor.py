"""Runs steps on devices, through compiled programs and jax's asynchronous dispatch.

`submit` launches and returns; a thread for each step in flight waits for its tokens.
Programs on overlapping devices must be launched in one order everywhere, or they wait for
each other forever: one lock in the process orders all launches, also those of other engines.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from loongjax.cluster.mesh import DeviceGrid
from loongjax.esp.history import Trips, history_trips
from loongjax.executor.device_memory import DeviceMemory
from loongjax.executor.inputs import (
    StepInputs,
    TokenLog,
    add_history,
    decode_inputs,
    migrate_inputs,
    prefill_inputs,
    stripe_tokens,
)
from loongjax.executor.protocol import ExecutorLimits, RequestInput
from loongjax.kvcache.messages import DecodeSlots, MigrateSlots, PrefillSlots, SlotPlan
from loongjax.kvcache.pool import KVPool
from loongjax.kvcache.tables import BlockTable
from loongjax.models.placement import PlacedWeights
from loongjax.plan import (
    DecodeStep,
    Group,
    MigrateStep,
    PrefillStep,
    RequestId,
    SampledToken,
    Step,
    StepResult,
    Topology,
)
from loongjax.programs.build import META_SPEC, TOKEN_SPEC, ProgramShapes
from loongjax.programs.catalogue import Catalogue
from loongjax.programs.counts import ProgramCounts
from loongjax.programs.guard import CompileGuard
from loongjax.programs.library import ProgramLibrary
from loongjax.programs.spec import ProgramSpec
from loongjax.programs.store import ProgramStore
from pallas_kernels.paged_attention import chunk_entries

_log = logging.getLogger(__name__)
_LAUNCH_ORDER = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launched:
    """A step that runs: its tokens will stand in `tokens`."""

    step: Step
    inputs: StepInputs
    tokens: jax.Array
    started: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Output:
    """A decode step's tokens, perhaps still to come, and the place of each request's."""

    tokens: jax.Array
    places: dict[RequestId, int]


class JaxExecutor:
    """The executor of real devices; see `loongjax.executor.protocol.Executor`."""

    def __init__(
        self,
        *,
        weights: PlacedWeights,
        shapes: ProgramShapes,
        grid: DeviceGrid,
        catalogue: Catalogue,
        store: ProgramStore | None,
        guard: CompileGuard | None = None,
    ) -> None:
        """`grid` are the devices that hold `weights`, `[instance][tp rank]`; `store` None
        keeps compiled programs in memory only; `guard` None compiles whenever it must.
        """
        self.catalogue = catalogue
        self._limits = ExecutorLimits(
            max_chunk_tokens=catalogue.max_chunk_tokens, max_rows=catalogue.max_rows
        )
        self._shapes = shapes
        self.memory = DeviceMemory(weights, shapes, grid)
        self.programs = ProgramLibrary(shapes, self.memory.meshes, store, guard)
        self._tables = [self._new_table() for _ in grid]
        self._logs: dict[RequestId, TokenLog] = {}
        self._outputs: dict[Group, _Output] = {}  # of each group's last decode step
        self._groups: dict[int, Group] = {}
        self._results: queue.SimpleQueue[StepResult | None] = queue.SimpleQueue()
        # Not a ThreadPoolExecutor: Python stops those before exit handlers can close engines.
        self._launched: queue.SimpleQueue[_Launched | None] = queue.SimpleQueue()
        self._waiters = [
            threading.Thread(target=self._wait, name=f"loongjax-step-{i}", daemon=True)
            for i in range(len(grid))  # disjoint groups: no more steps than instances run
        ]
        for waiter in self._waiters:
            waiter.start()

    @property
    def topology(self) -> Topology:
        """The groups that it can run."""
        return self.catalogue.topology

    @property
    def limits(self) -> ExecutorLimits:
        """What one step may hold."""
        return self._limits

    @property
    def program_counts(self) -> ProgramCounts:
        """How its programs came to be."""
        return self.programs.counts

    @property
    def pool_slots(self) -> int:
        """KV tokens that each instance holds."""
        return self._shapes.slots

    def now(self) -> float:
        """Seconds on the machine's monotonic clock."""
        return time.monotonic()

    def admit(self, request: RequestInput) -> None:
        """Makes a request's tokens known."""
        self._logs[request.id] = TokenLog(request)

    def submit(self, step: Step, slots: SlotPlan) -> None:
        """Launches a step. Compiles its program first if nobody needed it before."""
        self._groups[step.seq] = step.group
        try:
            with self.programs.guard.watch(f"step {step.seq}"):
                program = self.programs.get(self.spec_for(step), step.group)
                self._launched.put(self._launch(program, step, slots))
        except Exception as error:
            _log.exception("step %d failed to start", step.seq)
            self._results.put(self._failure(step, error, self.now()))

    def poll(self, timeout: float) -> list[StepResult]:
        """Finished steps; waits up to `timeout` seconds for the first."""
        messages = []
        try:
            messages.append(self._results.get(block=timeout > 0, timeout=max(timeout, 0)))
            while True:
                messages.append(self._results.get_nowait())
        except queue.Empty:
            results = [message for message in messages if message is not None]
        for result in results:
            self._settle(result)
        return results

    def wake(self) -> None:
        """Ends a waiting `poll`."""
        self._results.put(None)

    def drop_kv(self, request: RequestId) -> None:
        """Forgets where a request's KV lies; its tokens are kept."""
        for table in self._tables:
            table.release(request)

    def forget(self, request: RequestId) -> None:
        """Forgets all of a request."""
        self.drop_kv(request)
        self._logs.pop(request, None)

    def close(self) -> None:
        """Waits for what runs, and gives device memory back."""
        for _ in self._waiters:
            self._launched.put(None)
        for waiter in self._waiters:
            waiter.join()
        self._outputs.clear()
        self.programs.clear()
        self.memory.release()

    def spec_for(self, step: Step) -> ProgramSpec:
        """The program that a step needs."""
        if isinstance(step, MigrateStep):
            return self.catalogue.migrate(step.group)
        if isinstance(step, DecodeStep):
            fullest = max(Counter(row.master for row in step.rows).values(), default=0)
            return self.catalogue.decode(step.group, fullest)
        if any(chunk.start for chunk in step.chunks):
            return self.catalogue.extend(step.group)
        degree = len(step.group)
        tokens = sum(stripe_tokens(chunk.length, degree) for chunk in step.chunks)
        return self.catalogue.prefill(step.group, tokens)

    # ---- a step's way to the devices and back ----------------------------------------

    def _launch(
        self, program: Callable[..., tuple[KVPool, jax.Array]], step: Step, slots: SlotPlan
    ) -> _Launched:
        started, group = self.now(), step.group
        inputs, before, after = self._prepare(self.spec_for(step), step, slots)
        sharding = NamedSharding(self.memory.meshes[group], META_SPEC)
        for vectors in inputs.metas:
            meta = jax.device_put(vectors, sharding)
            with _LAUNCH_ORDER:
                pool, tokens = program(*before, self.memory.pool_of(group), meta, *after)
                self.memory.keep_pool(pool)
        if isinstance(step, DecodeStep):
            self._outputs[group] = _Output(tokens=tokens, places=dict(inputs.rows))
        return _Launched(step=step, inputs=inputs, tokens=tokens, started=started)

    def _prepare(
        self, spec: ProgramSpec, step: Step, slots: SlotPlan
    ) -> tuple[StepInputs, tuple[Any, ...], tuple[Any, ...]]:
        """A step's inputs, and the program's arguments before the pool and after them.

        Brings the block tables up to date: what a step reads of them it reads as they were
        before it, save that a decode step finds its new tokens there.
        """
        group, trash = step.group, self._shapes.slots
        tables = [self._tables[instance] for instance in group]
        match step, slots:
            case PrefillStep(), PrefillSlots():
                inputs = prefill_inputs(spec, step, slots, self._logs, trash)
                if spec.kind == "extend":
                    self._send_tables(group)
                    add_history(spec, step, inputs, tables, partial(self._trips, spec))
                for share in slots.shares:
                    self._tables[share.instance].append(share.request, share.entries)
                return inputs, (self.memory.weights_of(group),), ()
            case DecodeStep(), DecodeSlots():
                self._append_tokens(step, slots)
                last = self._last_output(spec, group)
                inputs = decode_inputs(spec, step, slots, self._logs, tables, trash, last.places)
                self._update_tables(spec, group, inputs)
                return inputs, (self.memory.weights_of(group),), (last.tokens,)
            case MigrateStep(), MigrateSlots():
                for move in slots.moves:
                    self._tables[move.source].replace(move.request, move.left)
                    self._tables[move.target].append(move.request, move.given)
                return migrate_inputs(spec, step, slots, trash), (), ()
        raise TypeError(f"{type(step).__name__} with {type(slots).__name__}")

    def _append_tokens(self, step: DecodeStep, slots: DecodeSlots) -> None:
        for row, slot, position in zip(step.rows, slots.slots, slots.positions, strict=True):
            entry = np.array([[slot, position, 1]], np.int32)
            self._tables[row.home].append(row.request, entry)

    def _update_tables(self, spec: ProgramSpec, group: Group, inputs: StepInputs) -> None:
        """Brings the devices' block tables up to date: a few entries go along with the
        step, a table with many changes is sent whole.
        """
        layout = spec.layout
        spare_entry = self._shapes.table_entries - 1
        for rank, instance in enumerate(group):
            field = layout.views(inputs.metas[0][rank])["update"]
            field[:, 0] = spare_entry
            table = self._tables[instance]
            batch = table.take_updates(len(field))
            if batch is None:
                continue
            if batch.whole:
                self.memory.replace_table(instance, self._whole_table(table))
            else:
                field[: len(batch.updates)] = batch.updates

    def _send_tables(self, group: Group) -> None:
        """Sends the block tables that changed, whole."""
        for instance in group:
            table = self._tables[instance]
            if table.take_updates(0) is not None:
                self.memory.replace_table(instance, self._whole_table(table))

    def _trips(self, spec: ProgramSpec, tokens: int, items: int) -> Trips:
        c, itemsize = self._shapes.config, np.dtype(self._shapes.dtype).itemsize
        block_size = self._shapes.block_size
        return history_trips(
            tokens=tokens,
            bucket=spec.bucket,
            items=items,
            item_tokens=chunk_entries(block_size) * block_size,
            query_bytes=c.heads * (c.head_dim * itemsize + (c.head_dim + 1) * 4),
            key_bytes=2 * c.kv_heads * c.head_dim * itemsize,
        )

    def _whole_table(self, table: BlockTable) -> np.ndarray:
        rows = np.zeros((self._shapes.table_entries, 3), np.int32)
        rows[: table.capacity] = table.entries
        return rows

    def _last_output(self, spec: ProgramSpec, group: Group) -> _Output:
        """What the group's last decode step put out, if this one can read it; else zeros."""
        last = self._outputs.get(group)
        if last is not None and last.tokens.shape == (spec.degree * spec.rows,):
            return last
        zeros = np.zeros(spec.degree * spec.rows, np.int32)
        sharding = NamedSharding(self.memory.meshes[group], TOKEN_SPEC)
        return _Output(tokens=jax.device_put(zeros, sharding), places={})

    def _wait(self) -> None:
        """In threads of its own: waits for the tokens of one launched step after another."""
        while (launched := self._launched.get()) is not None:
            self._results.put(self._result(launched))

    def _result(self, launched: _Launched) -> StepResult:
        step, started = launched.step, launched.started
        try:
            found = np.asarray(launched.tokens)
        except Exception as error:
            _log.exception("step %d failed", step.seq)
            return self._failure(step, error, started)
        return StepResult(
            seq=step.seq,
            tokens=tuple(SampledToken(name, int(found[at])) for name, at in launched.inputs.rows),
            started=started,
            ended=self.now(),
        )

    def _failure(self, step: Step, error: Exception, started: float) -> StepResult:
        text = f"{type(error).__name__}: {error}"
        return StepResult(seq=step.seq, error=text, started=started, ended=self.now())

    def _settle(self, result: StepResult) -> None:
        """Notes what a finished step changed; in the engine's thread."""
        group = self._groups.pop(result.seq)
        for request, token in result.tokens:
            if request in self._logs:
                self._logs[request].append(token)
        if result.error is not None:
            self._outputs.pop(group, None)
            for instance in group:
                self.memory.rebuild(instance)
                self._tables[instance] = self._new_table()

    def _new_table(self) -> BlockTable:
        block_size = self._shapes.block_size
        capacity = self._shapes.table_entries - chunk_entries(block_size)
        return BlockTable(capacity=capacity, block_size=block_size)
