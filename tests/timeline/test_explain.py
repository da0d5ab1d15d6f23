"""A request's story in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loongjax.engine.messages import Decision
from loongjax.errors import UserError
from loongjax.timeline import Timeline
from tests.timeline.story import START, requests, steps


def story(*decisions: tuple[float, str]) -> Timeline:
    """The made-up seconds, in which the policy said this of the long prompt."""
    said = tuple(Decision(START + time, text) for time, text in decisions)
    long, *others = requests()
    return Timeline.from_steps(steps(), requests=[replace(long, decisions=said), *others])


def test_decisions_stand_before_the_steps_that_followed() -> None:
    name = requests()[0].id
    lines = (
        story((0.0, "waits: for nothing"), (1.5, "goes on: somewhere")).explain(name).split("\n")
    )
    assert lines[0].startswith(f"{name} came at")
    first = next(i for i, line in enumerate(lines) if "waits: for nothing" in line)
    assert "step on" in lines[first + 1]
    second = next(i for i, line in enumerate(lines) if "goes on: somewhere" in line)
    assert first < second
    times = [float(line.split()[0]) for line in lines[1:]]
    assert times == sorted(times)


def test_successive_steps_of_a_kind_on_one_group_are_one_line() -> None:
    name = requests()[0].id
    told = [line for line in story().explain(name).split("\n") if "decode step on" in line]
    mine = [s for s in steps() if name in s.requests and s.kind == "decode"]
    assert 1 <= len(told) < len(mine)
    assert any(" x decode step on" in line for line in told)


def test_an_unknown_request_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="no request 'nobody'"):
        story().explain("nobody")
