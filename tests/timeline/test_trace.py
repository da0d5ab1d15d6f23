"""The trace is what Chrome's trace event format asks for, and says what the records say."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from loongjax.timeline import Timeline
from loongjax.timeline.trace import INSTANCES, REQUESTS
from tests.timeline.story import START, decode, pool, prefill, steps, timeline

Events = list[dict[str, Any]]


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Any]:
    timeline().save_trace(tmp_path / "trace.json")
    return json.loads((tmp_path / "trace.json").read_text())


@pytest.fixture
def events(saved: dict[str, Any]) -> Events:
    return saved["traceEvents"]


def of(events: Events, *phases: str) -> Events:
    return [event for event in events if event["ph"] in phases]


def test_every_event_has_what_the_format_asks_for(saved, events) -> None:
    assert saved["displayTimeUnit"] == "ms"
    assert saved["otherData"] == {"instances": 4, "pool_slots": 2048, "zero_s": START}
    assert {event["ph"] for event in events} == {"M", "X", "C", "b", "e", "s", "f"}
    for event in events:
        assert isinstance(event["name"], str)
        assert event["pid"] in (INSTANCES, REQUESTS)
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] in "Xsf":
            assert event["tid"] in (1, 2, 3, 4)
        if event["ph"] in "besf":
            assert {"id", "cat"} <= event.keys()


def test_events_are_sorted_and_start_with_the_first_step(events) -> None:
    named = len(of(events, "M"))
    assert {event["ph"] for event in events[:named]} == {"M"}
    times = [event["ts"] for event in events[named:]]
    assert times == sorted(times)
    assert times[0] == of(events, "X")[0]["ts"] == 0


def test_tracks_are_named_after_instances(events) -> None:
    names = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    assert names == {i + 1: f"instance {i}" for i in range(4)}


def test_each_step_is_a_slice_on_every_instance_of_its_group(events) -> None:
    slices = of(events, "X")
    assert len(slices) == sum(step.degree for step in steps())
    first = slices[0]
    assert (first["name"], first["cat"]) == ("prefill x4", "prefill")
    assert first["dur"] == pytest.approx(800_000)
    assert first["args"] == {
        "seq": 0,
        "kind": "prefill",
        "degree": 4,
        "group": [0, 1, 2, 3],
        "requests": ["long"],
        "tokens": 1600,
        "kv_tokens_stored_here": 900,
    }
    failed = [event for event in slices if event["name"] == "failed prefill x1"]
    assert [event["args"]["error"] for event in failed] == ["StepError: lost a chip"]
    rows = {e["tid"]: e["args"]["rows_mastered_here"] for e in slices if e["args"]["seq"] == 66}
    assert rows == {2: 0, 4: 2}


def test_slices_of_a_track_do_not_overlap_even_when_steps_were_launched_ahead(tmp_path) -> None:
    ahead = [decode(i, (0,), 0.1 * i, 0.1 * i + 0.15, "a") for i in range(5)]
    Timeline.from_steps([*ahead, *steps()[:0]]).save_trace(tmp_path / "ahead.json")
    slices = of(json.loads((tmp_path / "ahead.json").read_text())["traceEvents"], "X")
    assert len(slices) == 5
    for before, after in pairwise(slices):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-6


def test_counters_follow_the_pool(events) -> None:
    found = defaultdict(list)
    for event in of(events, "C"):
        found[event["name"]].append((event["ts"], event["args"]["used"]))
    assert len(found) == 4
    expected = [(pytest.approx((s.time - START) * 1e6), s.used) for s in pool() if s.instance == 3]
    assert found["KV slots in use, instance 3"] == expected


def test_flows_follow_requests_from_group_to_group(events) -> None:
    slices = of(events, "X")
    flows = defaultdict(list)
    for event in of(events, "s", "f"):
        flows[event["id"]].append(event)
    arrows = Counter()
    for start, end in flows.values():
        assert (start["ph"], end["ph"], end["bp"]) == ("s", "f", "e")
        assert start["ts"] <= end["ts"]
        request = start["args"]["request"]
        around = [
            next(
                found["args"]
                for found in slices
                if found["tid"] == point["tid"]
                and found["ts"] <= point["ts"] <= found["ts"] + found["dur"]
                and request in found["args"]["requests"]
            )
            for point in (start, end)
        ]
        assert around[0]["seq"] < around[1]["seq"]
        arrows[request] += 1
    assert arrows == {"long": 4, "short": 1, "unlucky": 2, "late": 1}


def test_requests_are_nested_phases(events) -> None:
    open_now: dict[int, list[str]] = defaultdict(list)
    seen: dict[str, list[str]] = {}
    for event in of(events, "b", "e"):
        stack = open_now[event["id"]]
        if event["ph"] == "b":
            stack.append(event["name"])
            seen.setdefault(stack[0], []).append(event["name"])
        else:
            assert stack.pop() == event["name"]
    assert not any(open_now.values())
    assert seen["short"] == ["short", "waits", "prefill", "decode"]
    assert seen["late"] == ["late"]
    reasons = {e["name"]: e["args"]["reason"] for e in of(events, "b") if "reason" in e["args"]}
    assert reasons == {"long": "length", "short": "length", "unlucky": "length", "late": "open"}


def test_nothing_is_a_trace_too(tmp_path) -> None:
    Timeline.from_steps([]).save_trace(tmp_path / "nothing.json")
    saved = json.loads((tmp_path / "nothing.json").read_text())
    assert {event["ph"] for event in saved["traceEvents"]} == {"M"}


def test_a_part_keeps_the_times_of_the_whole(tmp_path) -> None:
    records = [prefill(i, (0,), i, i + 0.5, "a", kept={0: 1}) for i in range(4)]
    Timeline.from_steps(records).between(1.8, 2.6).save_trace(tmp_path / "part.json")
    slices = of(json.loads((tmp_path / "part.json").read_text())["traceEvents"], "X")
    assert [(event["args"]["seq"], event["ts"]) for event in slices] == [(2, 2_000_000)]
