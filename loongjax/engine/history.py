"""What the engine did: a bounded list of step records, and counters.

The loop writes, any thread reads; one lock guards both. Records are kept for looking back,
nothing in the engine depends on them.
"""

from __future__ import annotations

import threading
from collections import Counter, deque

from loongjax.engine.messages import (
    EngineStats,
    FinishReason,
    InstanceStats,
    StepCount,
    StepKind,
    StepRecord,
)
from loongjax.plan import DecodeStep, PrefillStep, RequestId, Share, Snapshot, Step, StepResult
from loongjax.plan import step_requests as requests_of
from loongjax.programs.counts import ProgramCounts

MAX_RECORDS = 100_000
MAX_MENTIONS = 1_000_000
"""Request names in all records together: about 32 bytes each."""


class History:
    """Step records, newest last; the oldest go when either limit is passed."""

    def __init__(self, *, max_records: int = MAX_RECORDS, max_mentions: int = MAX_MENTIONS) -> None:
        self._max_records = max_records
        self._max_mentions = max_mentions
        self._lock = threading.Lock()
        self._records: deque[StepRecord] = deque()
        self._by_request: dict[RequestId, deque[StepRecord]] = {}
        self._mentions = 0
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

    def add_end(self, reason: FinishReason) -> None:
        """A request ended."""
        with self._lock:
            self._finished[reason] += 1

    def steps(self) -> tuple[StepRecord, ...]:
        """All records that are kept, in the order in which the steps ended."""
        with self._lock:
            return tuple(self._records)

    def steps_of(self, request: RequestId) -> tuple[StepRecord, ...]:
        """The kept records of steps that worked on a request; empty if there are none."""
        with self._lock:
            return tuple(self._by_request.get(request, ()))

    def stats(self, snapshot: Snapshot, programs: ProgramCounts, *, alive: bool) -> EngineStats:
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
    kept: Counter[int] = Counter()
    if isinstance(step, PrefillStep):
        for placement in step.keep:
            for share in placement.shares:
                kept[share.instance] += share.tokens
    else:
        kept.update(row.home for row in step.rows)
    return StepRecord(
        seq=step.seq,
        kind="prefill" if isinstance(step, PrefillStep) else "decode",
        group=step.group,
        requests=requests_of(step),
        tokens=sum(kept.values()),
        kept=tuple(Share(i, tokens) for i, tokens in sorted(kept.items()) if tokens),
        masters=tuple(row.master for row in step.rows) if isinstance(step, DecodeStep) else (),
        started=result.started,
        ended=result.ended,
        error=result.error,
    )
