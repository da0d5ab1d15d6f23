"""The measurement of host time runs, and refuses what would not be worth printing. How long
anything takes is not tested.
"""

from __future__ import annotations

import pytest

from loongjax import LLM
from loongjax.bench import host
from loongjax.bench.host import (
    HostTimeReport,
    engine_without_device,
    measure_host_time,
    phase_means_us,
)
from loongjax.errors import BenchError, ConfigError
from loongjax.executor.host_time import PHASES

SIZE = {"rows": 2, "context": 30, "steps": 5}


@pytest.fixture
def llm():
    """An engine whose programs return at once."""
    with engine_without_device(**SIZE) as llm:
        yield llm


def check(report: HostTimeReport, steps: int) -> None:
    assert (report.rows, report.context, report.steps) == (2, 30, steps)
    assert list(report.phases) == [
        "planning",
        "tables",
        "launch",
        "landing",
        "delivering",
        "detokenizing",
    ]
    assert min(report.phases["tables"], report.phases["landing"]) > 0


def test_it_runs_on_a_real_engine(tmp_path):
    with LLM("random:tiny", pool_slots=512, program_dir=tmp_path) as llm:
        report = measure_host_time(llm, **SIZE)
        check(report, steps=5)
        assert report.call_us > 0
        assert report.bare_call_us > 0
        stats = llm.stats()
        assert [time.phase for time in stats.host][:4] == ["planning", "tables", "launch", "call"]
        assert all(time.count and time.seconds > 0 for time in stats.host)
        assert sum(instance.used for instance in stats.instances) == 0
        with pytest.raises(ConfigError, match="not 0"):
            measure_host_time(llm, rows=2, context=30, steps=0)


def test_it_runs_without_a_device(llm):
    report = measure_host_time(llm, **SIZE)
    check(report, steps=5)
    assert report.bare_call_us is None


def test_the_mean_of_a_phase_is_over_the_steps_between_the_ticks():
    def tick(planning: float, call: float) -> dict[str, float]:
        return dict.fromkeys(PHASES, 7.0) | {"planning": planning, "call": call}

    found = phase_means_us([tick(1.0, 5.0), tick(3.0, 5.0), tick(3.5, 6.0), tick(4.0, 14.0)])
    assert found == dict.fromkeys(PHASES, 0.0) | {"planning": 1e6, "call": 3e6}


def test_the_host_time_of_a_step_is_all_phases_and_not_the_call():
    report = HostTimeReport(
        rows=1,
        context=1,
        steps=1,
        phases={"tables": 2.0, "launch": 3.0},
        call_us=7.0,
        bare_call_us=1.0,
    )
    assert report.host_us == 5.0


def test_every_row_has_a_prompt_of_its_own_and_the_same_in_every_run():
    prompts = [host._request(row, 16, 1).token_ids for row in range(8)]
    assert len(set(prompts)) == 8
    assert prompts[3] == host._request(3, 16, 1).token_ids


def test_a_request_that_fails_is_an_error(llm, monkeypatch):
    def get(spec, group):
        raise RuntimeError("no such program")

    monkeypatch.setattr(llm.engine.executor.programs, "get", get)
    with pytest.raises(BenchError, match=r"host-0 ended with 'error'.* no such program"):
        measure_host_time(llm, **SIZE)


def short(monkeypatch, tokens: int) -> None:
    """Every request gets `tokens` tokens, whatever is asked."""
    request = host._request
    monkeypatch.setattr(host, "_request", lambda row, context, _: request(row, context, tokens))


def test_a_row_that_ends_before_the_measurement_is_an_error(llm, monkeypatch):
    short(monkeypatch, 3)
    with pytest.raises(BenchError, match="host-1 ended with 'length' instead of 'abort'"):
        measure_host_time(llm, **SIZE)


def test_too_few_ticks_are_an_error(llm, monkeypatch):
    short(monkeypatch, 3)
    with pytest.raises(BenchError, match="3 ticks came of the 10 that 5 steps need"):
        measure_host_time(llm, rows=1, context=30, steps=5)


def test_a_program_that_is_made_while_time_is_taken_is_an_error(llm, monkeypatch):
    programs = llm.engine.executor.programs
    get = programs.get

    def make(spec, group):
        programs._count(rebound=1)
        return get(spec, group)

    monkeypatch.setattr(programs, "get", make)
    with pytest.raises(BenchError, match=r"[1-9]\d* programs were made while host time was taken"):
        measure_host_time(llm, **SIZE)
