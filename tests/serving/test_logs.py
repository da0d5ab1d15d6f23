"""What the log says, and that nobody can write a line of their own."""

from __future__ import annotations

import json
import logging

import pytest

from loongjax.engine import Timings
from loongjax.sampling.params import SamplingParams
from serving import logs
from serving.service import Call, Report


@pytest.fixture
def report():
    call = Call(
        name='a\n{"level": "error"}',
        client="me",
        protocol="http",
        prompt="x",
        params=SamplingParams(),
    )
    timings = Timings(arrival=1.0, first_scheduled=1.5, first_token=2.0, end=3.0)
    return Report(
        call=call,
        outcome="length",
        prompt_tokens=1,
        answer_tokens=2,
        gate_s=0.25,
        total_s=2.5,
        timings=timings,
        error=None,
    )


def lines(kind, report, capsys) -> list[str]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.set_up(kind)
        logs.log_request(report)
        try:
            raise ValueError("no")
        except ValueError:
            logging.getLogger("serving").exception("it failed")
        return capsys.readouterr().err.splitlines()
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_json_is_an_object_a_line(report, capsys):
    first, second = map(json.loads, lines("json", report, capsys))
    assert first["request_id"] == report.call.name
    assert (first["ttft_s"], first["total_s"], first["outcome"]) == (1.25, 2.5, "length")
    assert (first["level"], first["message"]) == ("info", "request ended")
    assert second["level"] == "error"
    assert "ValueError: no" in second["exception"]


def test_text_quotes_what_clients_choose(report, capsys):
    first, second, *_ = lines("text", report, capsys)
    assert r'request_id="a\n{\"level\": \"error\"}"' in first
    assert second.endswith("serving: it failed")
