"""The measurement of host time runs, and its fields add up. What they say is not tested."""

from __future__ import annotations

import pytest

from loongjax import LLM
from loongjax.bench.host import HostTimeReport, engine_without_device, measure_host_time
from loongjax.errors import ConfigError


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
    assert report.host_us == sum(report.phases.values())
    assert min(report.phases["tables"], report.phases["landing"]) > 0


def test_it_runs_on_a_real_engine(tmp_path):
    with LLM("random:tiny", pool_slots=512, program_dir=tmp_path) as llm:
        report = measure_host_time(llm, rows=2, context=30, steps=5)
        check(report, steps=5)
        assert report.call_us > 0
        assert report.bare_call_us > 0
        stats = llm.stats()
        assert [time.phase for time in stats.host][:4] == ["planning", "tables", "launch", "call"]
        assert all(time.count and time.seconds > 0 for time in stats.host)
        assert sum(instance.used for instance in stats.instances) == 0
        with pytest.raises(ConfigError, match="not 0"):
            measure_host_time(llm, rows=2, context=30, steps=0)


def test_it_runs_without_a_device():
    with engine_without_device(rows=2, context=30, steps=5) as llm:
        report = measure_host_time(llm, rows=2, context=30, steps=5)
        check(report, steps=5)
        assert report.bare_call_us is None
