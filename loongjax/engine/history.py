"""What the engine did: bounded lists of steps, ended requests and use of the pool; counters.

The loop writes, any thread reads; one lock guards all. Records are kept for looking back,
nothing in the engine depends on them.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable

from loongjax.engine.messages import (
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
MAX_MENTIONS = 1_000_000
"""Request names in all records together: about 32 bytes each."""
MAX_SAMPLES = 200_000
"""Of the pool: about 150 bytes each."""


class History:
    """Step records, newest last; the oldest go when either limit is passed.

    Ended requests and samples of the pool have bounds of their own.
    """

    def __init__(
        self,
        *,
        max_records: int = MAX_RECORDS,
        max_mentions: int = MAX_MENTIONS,
        max_samples: int = MAX_SAMPLES,
    ) -> None:
        self._max_records = max_records
        self._max_mentions = max_mentions
        self._max_samples = max_samples
        self._lock = threading.Lock()
        self._records: deque[StepRecord] = deque()
        self._by_request: dict[RequestId, deque[StepRecord]] = {}
        self._mentions = 0
        self._ended: deque[RequestRecord] = deque(maxlen=max_records)
        self._pool: deque[PoolSample] = deque()
        self._pool_before: dict[InstanceId, PoolSample] = {}
        self._used: dict[InstanceId, int] = {}
        self._steps: Counter[tuple[StepKind, int]] = Counter()
        self._finished: Counter[FinishReason] = Counter()
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._preemptions = 0
        self._failed_steps = 0
        self._recomputed = 0

    def add_step(self, step: Step, result: StepResult) -> None:
        """Records a step that ended."""
        record = make_record(step, result)
        with self._lock:
            if record.error is not None:
                self._failed_steps += 1
            else:
                self._steps[record.kind, record.degree] += 1
                if record.kind == "prefill":
                    self._prompt_tokens += record.tokens
            self._records.append(record)
            self._mentions += len(record.requests)
            for request in record.requests:
                self._by_request.setdefault(request, deque()).append(record)
            while len(self._records) > self._max_records or self._mentions > self._max_mentions:
                self._drop_oldest()

    def add_token(self) -> None:
        """A token was handed out."""
        with self._lock:
            self._generated_tokens += 1

    def add_preemption(self) -> None:
        """A request's KV was dropped to make room."""
        with self._lock:
            self._preemptions += 1

    def add_recompute(self) -> None:
        """A request lost its KV to a failed step and waits again."""
        with self._lock:
            self._recomputed += 1

    def add_end(self, record: RequestRecord, reason: FinishReason) -> None:
        """A request ended."""
        with self._lock:
            self._finished[reason] += 1
            self._ended.append(record)

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
            return tuple(self._records)

    def steps_of(self, request: RequestId) -> tuple[StepRecord, ...]:
        """The kept records of steps that worked on a request; empty if there are none."""
        with self._lock:
            return tuple(self._by_request.get(request, ()))

    def requests(self, snapshot: Snapshot) -> tuple[RequestRecord, ...]:
        """Kept ended requests, then those open in `snapshot` that have not ended since."""
        with self._lock:
            ended = tuple(self._ended)
        known = {(record.id, record.arrival) for record in ended}
        views = (*snapshot.running, *snapshot.waiting)
        return ended + tuple(
            RequestRecord(
                id=view.id, prompt=view.prompt, generated=view.generated, arrival=view.arrival
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
                        used=view.slots - view.free_slots,
                        busy=view.busy_seq is not None,
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

    def _drop_oldest(self) -> None:
        record = self._records.popleft()
        self._mentions -= len(record.requests)
        for request in record.requests:
            of_request = self._by_request[request]
            of_request.popleft()  # records of a request are in the same order as all records
            if not of_request:
                del self._by_request[request]


def make_record(step: Step, result: StepResult) -> StepRecord:
    """What is kept of a step and its result."""
    kept: Counter[InstanceId] = Counter()
    match step:
        case PrefillStep():
            kind: StepKind = "prefill"
            for placement in step.keep:
                for share in placement.shares:
                    kept[share.instance] += share.tokens
        case DecodeStep():
            kind = "decode"
            kept.update(row.home for row in step.rows)
        case MigrateStep():
            kind = "migrate"
            for move in step.moves:
                kept[move.target] += move.tokens
    return StepRecord(
        seq=step.seq,
        kind=kind,
        group=step.group,
        requests=requests_of(step),
        tokens=sum(kept.values()),
        kept=tuple(Share(i, tokens) for i, tokens in sorted(kept.items()) if tokens),
        masters=tuple(row.master for row in step.rows) if isinstance(step, DecodeStep) else (),
        started=result.started,
        ended=result.ended,
        error=result.error,
    )
