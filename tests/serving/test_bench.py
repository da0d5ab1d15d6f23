"""The benches of a server, in short."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from loongjax.bench.oracle import Oracle
from loongjax.cli.bench_chaos import flaky_server
from loongjax.cli.main import main
from loongjax.errors import ConfigError
from loongjax.simulator.jobs import Job
from loongjax.simulator.traces import write_trace
from serving.bench.chaos import ChaosReport, _within, run_chaos
from serving.bench.load import Outcome, draw_questions
from serving.bench.report import Objective, percentiles, summarize
from tests.serving.server import ENGINE

pytestmark = pytest.mark.xdist_group("server")


@pytest.fixture
def own_cache(cache, monkeypatch):
    monkeypatch.setitem(os.environ, "XDG_CACHE_HOME", str(cache))


def bench(capsys, model, *arguments: str) -> dict:
    command = ["bench", "serve", "--model", str(model), *ENGINE, *arguments, "--json"]
    assert main([*command, "--prompt-tokens", "20", "--answer-tokens", "10"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.usefixtures("own_cache")
def test_rates_and_a_trace(capsys, model, tmp_path):
    report = bench(capsys, model, "--rate", "50,100", "--requests", "20")
    assert [run["rate"] for run in report["runs"]] == [50.0, 100.0]
    for run in report["runs"]:
        assert (run["requests"], run["completed"], run["failed"]) == (20, 20, 0)
        assert run["ttft_s"]["p50"] <= run["ttft_s"]["p99"] <= run["total_s"]["p99"]
        assert run["service_us_per_token"] > 0
    assert report["policy"] == "elastic"


@pytest.mark.usefixtures("own_cache")
def test_a_closed_loop_over_http_beside_the_bare_engine(capsys, model):
    arguments = ("--clients", "4", "--requests", "16", "--protocol", "http", "--bare")
    report = bench(capsys, model, *arguments)
    (run,) = report["runs"]
    assert (run["clients"], run["completed"]) == (4, 16)
    assert report["ratio_to_bare_engine"] > 0


@pytest.mark.usefixtures("own_cache")
def test_a_short_chaos(cache):
    report = run_chaos(flaky_server(0.01, 0), requests=150, instances=2)
    assert report["passed"], json.dumps(report)
    assert report["checked_answers"] > 20
    assert report["completed"] > 50
    assert min(report["aborted"], report["refused"], report["failed_steps"]) > 0


@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        ({}, True),
        ({"refused": 3, "failed": 2, "ties": 1, "failed_steps": 5, "fd_growth": -1}, True),
        ({"without_end": 1}, False),
        ({"unhandled": 1}, False),
        ({"wrong_tokens": 1}, False),
        ({"leaked_slots": 16}, False),
        ({"fd_growth": 1}, False),
        ({"thread_growth": 40}, False),
        ({"exit_code": 1}, False),
        ({"requests": 5_000, "rss_growth": 0.04}, True),
        ({"requests": 5_000, "rss_growth": 0.06}, False),
        ({"requests": 150, "rss_growth": 0.06}, True),
    ],
)
def test_what_passes(fields, passed):
    assert ChaosReport(**({"exit_code": 0} | fields)).passed is passed


def test_a_request_without_an_end_is_given_up():
    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    assert asyncio.run(_within(1, work(0.0))) == "done"
    with pytest.raises(TimeoutError):
        asyncio.run(_within(1, work(60.0)))


def test_what_a_load_amounts_to():
    good = Outcome(tokens=3, ttft_s=0.5, tpot_s=0.05, total_s=0.6, error=None)
    late = Outcome(tokens=3, ttft_s=1.5, tpot_s=0.05, total_s=1.6, error=None)
    slow = Outcome(tokens=3, ttft_s=0.5, tpot_s=0.2, total_s=0.9, error=None)
    short = Outcome(tokens=1, ttft_s=0.5, tpot_s=None, total_s=0.5, error=None)
    failed = Outcome(tokens=0, ttft_s=None, tpot_s=None, total_s=0.1, error="no")
    found = summarize([good, late, slow, short, failed], 2.0, Objective())
    assert (found["completed"], found["failed"], found["errors"]) == (4, 1, ["no"])
    assert (found["slo_attainment"], found["goodput_per_s"]) == (0.4, 1.0)
    assert found["output_tokens_per_s"] == 5.0


def test_percentiles():
    assert percentiles([None]) == {"p50": None, "p90": None, "p99": None}
    assert percentiles([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert percentiles([float(n) for n in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_draws_are_repeatable_and_as_asked():
    draw = {"count": 200, "rate": 4.0, "prompt_tokens": 20, "answer_tokens": 8, "vocab": 256}
    questions = draw_questions(**draw, seed=1)
    assert questions == draw_questions(**draw, seed=1)
    assert 40 < questions[-1].arrival_s < 60
    assert all(10 <= len(question.prompt) <= 30 for question in questions)
    assert all(4 <= question.answer_tokens <= 12 for question in questions)


def test_a_trace_is_sent_as_it_is(tmp_path):
    from serving.bench.serve import Load

    jobs = [Job(id=f"{i}", arrival=float(i), prompt=3 + i, output=2, limit=2) for i in (0, 1)]
    write_trace(tmp_path / "trace.jsonl", jobs)
    questions = Load(trace=str(tmp_path / "trace.jsonl")).questions(1.0)
    assert [(q.arrival_s, len(q.prompt), q.answer_tokens) for q in questions] == [
        (0.0, 3, 2),
        (1.0, 4, 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chaos", "--requests", "3"], "--requests must be at least 10"),
        (["chaos", "--failure-rate", "1"], "--failure-rate must be in [0, 1), not 1.0"),
        (["serve", "--model", "x", "--clients", "0"], "--clients must be at least 1, not 0"),
        (["serve", "--model", "x", "--slo-ttft-s", "0"], "ttft_s must be above 0"),
    ],
)
def test_bad_options(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_objective_is_a_time():
    with pytest.raises(ConfigError, match="tpot_s must be above 0, not nan"):
        Objective(tpot_s=float("nan"))


def test_the_oracle_knows_right_from_wrong():
    oracle = Oracle("random:tiny")
    logits = oracle._logits([1, 2, 3])
    best = int(logits[-1].argmax())
    assert oracle.judge((1, 2, 3), (best,)) == "right"
    assert oracle.judge((1, 2, 3), ((best + 1) % 512,)) == "wrong"
