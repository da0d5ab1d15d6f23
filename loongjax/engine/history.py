"""What the engine did: bounded lists of steps, ended requests and use of the pool; counters.

The loop writes, any thread reads; one lock guards all. Records are kept for looking back,
nothing in the engine depends on them; so steps are kept as they came, and whoever reads them pays
for making records of them.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from loongjax.engine.messages import (
    Decision,
    EngineStats,
    FinishReason,
    InstanceStats,
    PoolSample,
    RequestRecord,
    StepCount,
    StepKind,
    StepRecord,
)
from loongjax.executor.host_time import PhaseTime
from loongjax.plan import (
    DecodeStep,
    InstanceId,
    MigrateStep,
    PrefillStep,
    Reason,
    RequestId,
    Share,
    Snapshot,
    Step,
    StepResult,
)
from loongjax.plan import step_requests as requests_of
from loongjax.programs.counts import ProgramCounts

MAX_RECORDS = 100_000
"""Of steps; as many ended requests are kept."""
MENTIONS = 10
"""Requests that are named in a record that is kept, on average at most: about 160 bytes each."""
SAMPLES = 2
"""Of the pool, for each record that is kept: about 150 bytes each."""
DECISIONS = 200
"""About one request, that are kept: about 100 bytes each."""


_KINDS: dict[type[Step], StepKind] = {
    PrefillStep: "prefill",
    DecodeStep: "decode",
    MigrateStep: "migrate",
}


class _Ended(NamedTuple):
    """A step that ended, and how many requests it names."""

    step: Step
    result: StepResult
    mentions: int


class History:
    """Step records, newest last; the oldest go when either limit is passed.

    Ended requests and samples of the pool have bounds of their own.
    """

    def __init__(
        self,
        *,
        max_records: int = MAX_RECORDS,
        max_mentions: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        self._max_records = max_records
        self._max_mentions = max_mentions or MENTIONS * max_records
        self._max_samples = max_samples or SAMPLES * max_records
        self._lock = threading.Lock()
        self._ended_steps: deque[_Ended] = deque()
        self._by_request: dict[RequestId, deque[_Ended]] = {}
        self._indexed = 0  # of all that ended, those that are in `_by_request`, or were
        self._mentions = 0
        self._ended: deque[RequestRecord] = deque(maxlen=max_records)
        self._decisions: dict[RequestId, deque[Decision]] = {}
        self._pool: deque[PoolSample] = deque()
        self._pool_before: dict[InstanceId, PoolSample] = {}
        self._used: dict[InstanceId, int] = {}
        self._steps: Counter[tuple[StepKind, int]] = Counter()
        self._finished: Counter[FinishReason] = Counter()
        self._ended_count = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._preemptions = 0
        self._failed_steps = 0
        self._recomputed = 0

    def add_step(self, step: Step, result: StepResult) -> None:
        """Records a step that ended."""
        ended = _Ended(step, result, len(requests_of(step)))
        with self._lock:
            if result.error is not None:
                self._failed_steps += 1
            else:
                self._steps[_KINDS[type(step)], len(step.group)] += 1
                if isinstance(step, PrefillStep):
                    self._prompt_tokens += sum(chunk.length for chunk in step.chunks)
            self._ended_steps.append(ended)
            self._ended_count += 1
            self._mentions += ended.mentions
            while len(self._ended_steps) > self._max_records or self._mentions > self._max_mentions:
                self._drop_oldest()

    def add_tokens(self, count: int) -> None:
        """So many tokens were handed out."""
        with self._lock:
            self._generated_tokens += count

    def add_preemption(self) -> None:
        """A request's KV was dropped to make room."""
        with self._lock:
            self._preemptions += 1

    def add_recompute(self) -> None:
        """A request lost its KV to a failed step and waits again."""
        with self._lock:
            self._recomputed += 1

    def add_reasons(self, time: float, reasons: Iterable[Reason]) -> None:
        """What a plan said of open requests; only what changed is kept."""
        with self._lock:
            for name, text in reasons:
                told = self._decisions.get(name)
                if told is None:
                    told = self._decisions[name] = deque(maxlen=DECISIONS)
                if not told or told[-1].text != text:
                    told.append(Decision(time, text))

    def add_end(self, record: RequestRecord, reason: FinishReason) -> None:
        """A request ended."""
        with self._lock:
            self._finished[reason] += 1
            decisions = tuple(self._decisions.pop(record.id, ()))
            self._ended.append(replace(record, decisions=decisions) if decisions else record)

    def forget(self, stem: RequestId) -> None:
        """A stem is closed, of which no end is told."""
        with self._lock:
            self._decisions.pop(stem, None)

    def add_pool(self, time: float, used: Iterable[Share]) -> None:
        """The use of some instances' pools; only what changed is kept."""
        with self._lock:
            for instance, slots in used:
                if self._used.get(instance, 0) != slots:
                    self._used[instance] = slots
                    self._pool.append(PoolSample(time, instance, slots))
            while len(self._pool) > self._max_samples:
                oldest = self._pool.popleft()
                self._pool_before[oldest.instance] = oldest

    def steps(self) -> tuple[StepRecord, ...]:
        """All records that are kept, in the order in which the steps ended."""
        with self._lock:
            ended = tuple(self._ended_steps)
        return tuple([make_record(step, result) for step, result, _ in ended])

    def steps_since(self, seen: int) -> tuple[tuple[StepRecord, ...], int]:
        """Kept records of the steps that ended after the first `seen`, and how many ended so far.

        O(new records).
        """
        with self._lock:
            ended = self._newest(self._ended_count - seen)
            count = self._ended_count
        return tuple([make_record(step, result) for step, result, _ in ended]), count

    def steps_of(self, request: RequestId) -> tuple[StepRecord, ...]:
        """The kept records of steps that worked on a request; empty if there are none.

        O(its records, and rows of all steps since this was last asked).
        """
        with self._lock:
            self._index()
            ended = tuple(self._by_request.get(request, ()))
        return tuple([make_record(step, result) for step, result, _ in ended])

    def requests(self, snapshot: Snapshot | None = None) -> tuple[RequestRecord, ...]:
        """Kept ended requests, then those open in `snapshot` that have not ended since."""
        with self._lock:
            ended = tuple(self._ended)
            decisions = {name: tuple(told) for name, told in self._decisions.items()}
        known = {(record.id, record.arrival) for record in ended}
        views = () if snapshot is None else (*snapshot.running, *snapshot.waiting)
        return ended + tuple(
            RequestRecord(
                id=view.id,
                prompt=view.prompt,
                generated=view.generated,
                arrival=view.arrival,
                decisions=decisions.get(view.id, ()),
            )
            for view in views
            if (view.id, view.arrival) not in known
        )

    def pool(self) -> tuple[PoolSample, ...]:
        """Every change of an instance's use that is kept, by time; before its first, it is 0."""
        with self._lock:
            before = sorted(self._pool_before.values())
            return (*before, *self._pool)

    def stats(
        self,
        snapshot: Snapshot,
        programs: ProgramCounts,
        host: tuple[PhaseTime, ...],
        *,
        alive: bool,
        draining: frozenset[InstanceId] = frozenset(),
    ) -> EngineStats:
        """The counters, together with what `snapshot` and the executor show."""
        with self._lock:
            return EngineStats(
                alive=alive,
                waiting=len(snapshot.waiting),
                running=len(snapshot.running),
                instances=tuple(
                    InstanceStats(
                        id=view.id,
                        slots=view.slots,
                        used=view.slots - view.free_slots - view.withheld,
                        busy=view.busy_seq is not None,
                        draining=view.id in draining,
                    )
                    for view in snapshot.instances
                ),
                steps=tuple(
                    StepCount(kind=kind, degree=degree, count=count)
                    for (kind, degree), count in sorted(self._steps.items())
                ),
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                preemptions=self._preemptions,
                failed_steps=self._failed_steps,
                recomputed_requests=self._recomputed,
                finished=tuple(sorted(self._finished.items())),
                programs=programs,
                host=host,
            )

    def _newest(self, count: int) -> list[_Ended]:
        """The last so many steps that are kept, or all. O(count)."""
        return list(islice(reversed(self._ended_steps), max(count, 0)))[::-1]

    def _index(self) -> None:
        """Notes for every request which steps worked on it: what nobody asks for costs nothing."""
        for ended in self._newest(self._ended_count - self._indexed):
            for name in requests_of(ended.step):
                self._by_request.setdefault(name, deque()).append(ended)
        self._indexed = self._ended_count

    def _drop_oldest(self) -> None:
        first = self._ended_count - len(self._ended_steps)
        oldest = self._ended_steps.popleft()
        self._mentions -= oldest.mentions
        if first >= self._indexed:
            return
        for request in requests_of(oldest.step):
            of_request = self._by_request[request]
            of_request.popleft()  # steps of a request are in the same order as all steps
            if not of_request:
                del self._by_request[request]


def make_record(step: Step, result: StepResult) -> StepRecord:
    """What is kept of a step and its result."""
    kept: Counter[InstanceId] = Counter()
    match step:
        case PrefillStep():
            for placement in step.keep:
                for share in placement.shares:
                    kept[share.instance] += share.tokens
        case DecodeStep():
            kept.update(row.home for row in step.rows)
        case MigrateStep():
            for move in step.moves:
                kept[move.target] += move.tokens
    return StepRecord(
        seq=step.seq,
        kind=_KINDS[type(step)],
        group=step.group,
        requests=requests_of(step),
        tokens=sum(kept.values()),
        kept=tuple(Share(i, tokens) for i, tokens in sorted(kept.items()) if tokens),
        masters=tuple(row.master for row in step.rows) if isinstance(step, DecodeStep) else (),
        started=result.started,
        ended=result.ended,
        error=result.error,
    )
