"""A timeline as a trace in Chrome's event format, which Perfetto reads too.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

Process 1 has a thread for each instance, with a complete event (`X`) for each step and a
counter (`C`) of KV slots; process 2 has nestable async events (`b`, `e`) for each request.
Flow events (`s`, `f`) lead from step to step of a request where kind, group or master change;
in between they would be an arrow for every token. Events are ordered by time, after the
metadata (`M`); times are whole nanoseconds, written in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from loongjax.engine.messages import RequestRecord
from loongjax.plan import InstanceId, RequestId
from loongjax.timeline.runs import Span, spans_of

if TYPE_CHECKING:
    from loongjax.timeline.timeline import Timeline

Event: TypeAlias = dict[str, Any]

INSTANCES, REQUESTS = 1, 2
"""The two processes."""


def write_trace(timeline: Timeline, file: TextIO) -> None:
    """Writes the trace, one event a line."""
    head = {
        "displayTimeUnit": "ms",
        "otherData": {
            "instances": timeline.instances,
            "pool_slots": timeline.pool_slots,
            "zero_s": timeline.zero,
        },
    }
    file.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
    file.write(",\n".join(json.dumps(event) for event in trace_events(timeline)))
    file.write("\n]}\n")


def trace_events(timeline: Timeline) -> list[Event]:
    """All events: metadata first, the others by time."""
    spans = spans_of(timeline.steps, timeline.zero)
    timed = [
        *_slices(spans),
        *_counters(timeline),
        *_requests(timeline),
        *_flows(spans),
    ]
    timed.sort(key=lambda event: event["ts"])  # stable: what opens first stays outside
    return [*_names(timeline), *timed]


def _names(timeline: Timeline) -> Iterator[Event]:
    for pid, name in ((INSTANCES, "instances"), (REQUESTS, "requests")):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for i in range(timeline.instances):
        place = {"ph": "M", "pid": INSTANCES, "tid": _thread(i)}
        yield {**place, "name": "thread_name", "args": {"name": f"instance {i}"}}
        yield {**place, "name": "thread_sort_index", "args": {"sort_index": i}}


def _slices(spans: list[Span]) -> Iterator[Event]:
    for step, begin, end in spans:
        ts, until = _ns(begin), _ns(end)
        kept = dict(step.kept)
        for instance in step.group:
            args: Event = {
                "seq": step.seq,
                "kind": step.kind,
                "degree": step.degree,
                "group": step.group,
                "requests": step.requests,
                "tokens": step.tokens,
                "kv_tokens_stored_here": kept.get(instance, 0),
            }
            if step.masters:
                args["rows_mastered_here"] = step.masters.count(instance)
            if step.error is not None:
                args["error"] = step.error
            failed = "failed " if step.error is not None else ""
            yield {
                "ph": "X",
                "name": f"{failed}{step.kind} x{step.degree}",
                "cat": step.kind,
                "pid": INSTANCES,
                "tid": _thread(instance),
                "ts": ts / 1000,
                "dur": (until - ts) / 1000,
                "args": args,
            }


def _counters(timeline: Timeline) -> Iterator[Event]:
    for time, instance, used in timeline.pool:
        yield {
            "ph": "C",
            "name": f"KV slots in use, instance {instance}",
            "pid": INSTANCES,
            "ts": _ns(max(0.0, time - timeline.zero)) / 1000,
            "args": {"used": used},
        }


def _requests(timeline: Timeline) -> Iterator[Event]:
    for number, request in enumerate(timeline.requests):
        place = {"cat": "request", "id": number, "pid": REQUESTS, "tid": 1}
        for ph, name, time, args in _phases(request, timeline.zero + timeline.bounds[1]):
            ts = _ns(max(0.0, time - timeline.zero)) / 1000
            yield {"ph": ph, "name": name, **place, "ts": ts, "args": args}


def _phases(request: RequestRecord, now: float) -> Iterator[tuple[str, str, float, Event]]:
    """(ph, name, time, args) of a request's life, in the order in which they nest."""
    args = {
        "prompt_tokens": request.prompt,
        "generated_tokens": request.generated,
        "reason": request.reason or "open",
    }
    end = now if request.end is None else request.end
    yield "b", request.id, request.arrival, args
    marks = [
        ("waits", request.arrival),
        ("prefill", request.first_scheduled),
        ("decode", request.first_token),
    ]
    known = [(name, begin) for name, begin in marks if begin is not None]
    for (name, begin), until in zip(known, [*(b for _, b in known[1:]), end], strict=True):
        if request.end is not None:
            yield "b", name, begin, {}
            yield "e", name, until, {}
    yield "e", request.id, end, {}


def _flows(spans: list[Span]) -> Iterator[Event]:
    numbers = count(1)
    last: dict[RequestId, tuple[tuple[object, ...], Event]] = {}
    for step, begin, end in spans:
        for row, request in enumerate(step.requests):
            instance: InstanceId = step.masters[row] if step.masters else step.group[0]
            here = (step.kind, step.group, instance)
            point = {
                "name": "request",
                "cat": "flow",
                "pid": INSTANCES,
                "tid": _thread(instance),
                "ts": (_ns(begin) + _ns(end)) // 2 / 1000,  # inside the slice it belongs to
                "args": {"request": request},
            }
            before, start = last.get(request, (here, point))
            if before != here:
                number = next(numbers)
                yield {"ph": "s", "id": number, **start}
                yield {"ph": "f", "bp": "e", "id": number, **point}
            last[request] = (here, point)


def _thread(instance: InstanceId) -> int:
    return instance + 1  # 0 means the idle thread to Perfetto


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
