"""Runs steps on devices, through compiled programs and jax's asynchronous dispatch.

`submit` launches and returns; other threads wait for the tokens (`waiting`). Programs on
overlapping devices must be launched in one order everywhere, or they wait for each other
forever: one lock in the process orders all launches, also those of other engines.

A decode step may be queued behind one of the same group whose tokens are not known: its program
takes them from the last one's output, which stays on the devices.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from loongjax.cluster.mesh import DeviceGrid
from loongjax.errors import StepError
from loongjax.esp.history import Trips, history_trips, item_entries
from loongjax.executor.device_memory import DeviceMemory
from loongjax.executor.host_time import HostTime
from loongjax.executor.inputs import (
    DecodeFrame,
    StepInputs,
    add_history,
    migrate_inputs,
    prefill_inputs,
    stripe_tokens,
)
from loongjax.executor.noted_rows import NotedRows
from loongjax.executor.protocol import ExecutorLimits, RequestInput
from loongjax.executor.token_log import TokenLog
from loongjax.executor.waiting import Launched, Waiters, failure
from loongjax.kvcache.messages import DecodeSlots, MigrateSlots, PrefillSlots, SlotPlan
from loongjax.kvcache.tables import BlockTable
from loongjax.models.placement import PlacedWeights
from loongjax.plan import (
    DecodeStep,
    Group,
    InstanceId,
    MigrateStep,
    PrefillStep,
    RequestId,
    Step,
    StepResult,
    Topology,
)
from loongjax.programs.build import META_SPEC, ROW_SPEC, TABLE_SPEC, ProgramShapes
from loongjax.programs.catalogue import Catalogue
from loongjax.programs.counts import ProgramCounts
from loongjax.programs.guard import CompileGuard
from loongjax.programs.library import ProgramLibrary
from loongjax.programs.spec import ProgramSpec
from loongjax.programs.store import ProgramStore
from loongjax.sampling.fields import SAID
from pallas_kernels.backends import kernels_of
from pallas_kernels.paged_attention import chunk_entries

_log = logging.getLogger(__name__)
_LAUNCH_ORDER = threading.Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Output:
    """What a decode step said, perhaps still to come, and the place of each request's token."""

    said: jax.Array
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
            max_chunk_tokens=catalogue.max_chunk_tokens,
            max_rows=catalogue.max_rows,
            steps_ahead=1,
        )
        self._shapes = shapes
        self.memory = DeviceMemory(weights, shapes, grid)
        self.programs = ProgramLibrary(shapes, self.memory.meshes, store, guard)
        self._tables = [self._new_table() for _ in grid]
        self._logs: dict[RequestId, TokenLog] = {}
        self._outputs: dict[Group, _Output] = {}  # of each group's last decode step
        self._frames: dict[Group, DecodeFrame] = {}  # likewise, of open requests only
        self._zeros: dict[tuple[Group, int], jax.Array] = {}
        self._row_tables: dict[Group, jax.Array] = {}  # of each group's frame, if it has any
        self._groups: dict[int, Group] = {}  # of steps in flight
        self._broken: set[InstanceId] = set()  # where a launch failed that is not settled yet
        self._doomed: set[int] = set()  # steps in flight behind one that failed
        self._results: queue.SimpleQueue[StepResult | None] = queue.SimpleQueue()
        self._waiters = Waiters(len(grid), self.now, self._results.put)
        self.host_time = HostTime()

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
        self._logs[request.id] = TokenLog(request, self._shapes.logits)

    def restrict(self, request: RequestId, allowed: np.ndarray) -> None:
        """Says which tokens may be a masked request's next."""
        self._logs[request].restrict(allowed)

    def fork(self, source: RequestId, target: RequestId) -> None:
        """Enters the KV of `source` for `target` too; nothing is copied on the devices."""
        for table in self._tables:
            table.fork(source, target)

    def submit(self, step: Step, slots: SlotPlan) -> None:
        """Launches a step. Compiles its program first if nobody needed it before."""
        self._groups[step.seq] = step.group
        started = self.now()
        item: Launched | StepResult
        try:
            if not self._broken.isdisjoint(step.group):
                raise StepError(f"a step before it on group {step.group} failed")
            with self.programs.guard.watch(f"step {step.seq}"):
                item = self._launch(step, slots, started)
        except Exception as error:
            _log.exception("step %d failed to start", step.seq)
            self._broken.update(step.group)
            item = failure(step.seq, error, started, self.now())
        self._waiters.add(step.group, item)
        self.host_time.lap("launch")

    def poll(self, timeout: float) -> list[StepResult]:
        """Finished steps; waits up to `timeout` seconds for the first."""
        messages = []
        try:
            messages.append(self._results.get(block=timeout > 0, timeout=max(timeout, 0)))
            while True:
                messages.append(self._results.get_nowait())
        except queue.Empty:
            results = [message for message in messages if message is not None]
        self.host_time.begin()
        settled = [self._settle(result) for result in results]
        self.host_time.lap("landing")
        return settled

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
        for group in [g for g, frame in self._frames.items() if request in frame.requests]:
            del self._frames[group]  # else it keeps the request's tokens

    def close(self) -> None:
        """Waits for what runs, and gives device memory back."""
        self._waiters.close()
        self._outputs.clear()
        self._frames.clear()
        self._zeros.clear()
        self._row_tables.clear()
        self.programs.clear()
        self.memory.release()

    def spec_for(self, step: Step) -> ProgramSpec:
        """The program that a step needs."""
        if isinstance(step, MigrateStep):
            return self.catalogue.migrate(step.group)
        if isinstance(step, DecodeStep):
            fullest = max(Counter(row.master for row in step.rows).values(), default=0)
            return self.catalogue.decode(step.group, fullest)
        degree = len(step.group)
        tokens = sum(stripe_tokens(chunk.length, degree) for chunk in step.chunks)
        if any(chunk.start for chunk in step.chunks):
            return self.catalogue.extend(step.group, tokens)
        return self.catalogue.prefill(step.group, tokens)

    # ---- a step's way to the devices and back ----------------------------------------

    def _launch(self, step: Step, slots: SlotPlan, started: float) -> Launched:
        group, frame = step.group, self._frame_of(step)
        spec = self.spec_for(step) if frame is None else frame.spec
        known = self.programs.counts
        program = self.programs.get(spec, group)
        if self.programs.counts is not known:
            self.host_time.begin()  # making a program is no part of running a step
        inputs, before, after = self._prepare(spec, step, slots)
        self.host_time.lap("tables")
        for vectors in inputs.metas:
            meta = self._to_devices(vectors, group)
            with _LAUNCH_ORDER:
                pool = self.memory.pool_of(group)
                self.host_time.lap("launch")
                pool, said, *scores = program(*before, pool, meta, *after)
                self.host_time.lap("call")
                self.memory.keep_pool(group, pool)
        if isinstance(step, DecodeStep):
            self._outputs[group] = _Output(said=said, places=dict(inputs.rows))
        return Launched(
            seq=step.seq,
            inputs=inputs,
            said=said,
            scores=scores[0] if scores else None,
            started=started,
        )

    def _to_devices(self, vectors: np.ndarray, group: Group) -> np.ndarray | jax.Array:
        """Inputs where the group's program wants them. One device takes them with the call; for
        several it is faster to send them before.
        """
        mesh = self.memory.meshes[group]
        if mesh.size == 1:
            return vectors
        return jax.device_put(vectors, NamedSharding(mesh, META_SPEC))

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
                    if any(chunk.start for chunk in step.chunks):  # else nothing reads them
                        self._send_tables(group)
                    add_history(spec, step, inputs, tables, partial(self._trips, spec))
                for share in slots.shares:
                    self._tables[share.instance].append(share.request, share.entries)
                noted = NotedRows([(self._logs[name], place) for name, place in inputs.rows])
                row_tables = self._send_noted(spec, group, noted)
                return inputs, (self.memory.weights_of(group),), (row_tables,)
            case DecodeStep(), DecodeSlots():
                self._append_tokens(step, slots)
                last = self._last_output(spec, group)
                known = self._frame_of(step)
                spare_entry = self._shapes.table_entries - 1
                frame = known or DecodeFrame(spec, step, self._logs, trash, spare_entry)
                if known is None or frame.noted.is_stale:
                    self._frames[group] = frame
                    self._row_tables[group] = self._send_noted(spec, group, frame.noted)
                inputs = frame.inputs(step, slots, tables, last.places)
                self._update_tables(spec, group, inputs)
                after = self._row_tables[group], last.said
                return inputs, (self.memory.weights_of(group),), after
            case MigrateStep(), MigrateSlots():
                for move in slots.moves:
                    self._tables[move.source].replace(move.request, move.left)
                    self._tables[move.target].append(move.request, move.given)
                return migrate_inputs(spec, step, slots, trash), (), ()
        raise TypeError(f"{type(step).__name__} with {type(slots).__name__}")

    def _frame_of(self, step: Step) -> DecodeFrame | None:
        """The frame of the group's last decode step, if this one goes on with the same rows."""
        frame = self._frames.get(step.group)
        same = frame is not None and isinstance(step, DecodeStep) and frame.rows is step.rows
        return frame if same else None

    def _append_tokens(self, step: DecodeStep, slots: DecodeSlots) -> None:
        for row, slot, position in zip(step.rows, slots.slots, slots.positions, strict=True):
            self._tables[row.home].append_token(row.request, slot, position)

    def _update_tables(self, spec: ProgramSpec, group: Group, inputs: StepInputs) -> None:
        """Brings the devices' block tables up to date: a few entries go along with the
        step, a table with many changes is sent whole.
        """
        fields = spec.layout.of_all_ranks(inputs.metas[0], "update")
        for field, instance in zip(fields, group, strict=True):
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
            item_tokens=item_entries(block_size, spec.degree) * block_size,
            query_bytes=c.heads * (c.head_dim * itemsize + (c.head_dim + 1) * 4),
            key_bytes=2 * c.kv_heads * c.head_dim * itemsize,
            passes_keys=not kernels_of(self._shapes.attention_backend).shares_keys,
        )

    def _whole_table(self, table: BlockTable) -> np.ndarray:
        rows = np.zeros((self._shapes.table_entries, 3), np.int32)
        rows[: table.capacity] = table.entries
        return rows

    def _send_noted(self, spec: ProgramSpec, group: Group, noted: NotedRows) -> jax.Array:
        """The sampling tables of a step's rows, on the devices."""
        if not noted:
            return self.memory.blank_tables(group, spec.rows)
        tables = noted.gather(spec.degree * spec.rows, self._shapes.logits)
        return jax.device_put(tables, NamedSharding(self.memory.meshes[group], TABLE_SPEC))

    def _last_output(self, spec: ProgramSpec, group: Group) -> _Output:
        """What the group's last decode step put out, if this one can read it; else zeros."""
        last = self._outputs.get(group)
        if last is not None and len(last.said) == spec.degree * spec.rows:
            return last
        zeros = self._zeros.get((group, spec.rows))
        if zeros is None:
            sharding = NamedSharding(self.memory.meshes[group], ROW_SPEC)
            zeros = jax.device_put(np.zeros((spec.degree * spec.rows, SAID), np.int32), sharding)
            self._zeros[group, spec.rows] = zeros
        return _Output(said=zeros, places={})

    def _settle(self, result: StepResult) -> StepResult:
        """Notes what a finished step changed; in the engine's thread."""
        group = self._groups.pop(result.seq)
        if result.seq in self._doomed:
            self._doomed.remove(result.seq)
            error = result.error or f"a step before it on group {group} failed"
            return replace(result, tokens=(), error=error)
        for sampled in result.tokens:
            if sampled.request in self._logs:
                self._logs[sampled.request].append(sampled.token)
        if result.error is not None:
            self._doomed.update(seq for seq, other in self._groups.items() if other == group)
            self._broken.difference_update(group)
            self._outputs.pop(group, None)
            self._frames.pop(group, None)
            self.memory.rebuild(group)
            for instance in group:
                self._tables[instance] = self._new_table()
        return result

    def _new_table(self) -> BlockTable:
        block_size = self._shapes.block_size
        capacity = self._shapes.table_entries - chunk_entries(block_size)
        return BlockTable(capacity=capacity, block_size=block_size)
