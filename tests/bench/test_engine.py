"""The report of `bench engine`: that it is what the documentation says, and who gets which cores.

Nothing is measured: workers, machine and engines are fakes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loongjax.bench import engine, peers
from loongjax.bench.cores import first_cores
from loongjax.bench.floor import Machine
from loongjax.bench.host import HostTimeReport
from loongjax.bench.process import Worker
from loongjax.cli.bench_engine import host_table
from loongjax.cli.main import main
from tests.bench.test_cells import FakeWorker

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
HOST = {
    "rows": 8,
    "total": 1084.4,
    "phases": {"planning": 119.0, "tables": 965.4},
    "call": 639.0,
    "bare_call": 523.0,
    "without_device": 543.0,
    "context_ratio": 1.2,
}


@pytest.fixture
def started(monkeypatch):
    """Puts fakes in the place of everything that takes time; the settings of every worker."""
    started = []

    class Started(FakeWorker, Worker):
        def __init__(self, name, *, python, subject, settings):
            super().__init__(name, 0.5, [])
            started.append((name, settings))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    class FakeLLM(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__(self)

        def generate(self, *_):
            pass

    def measure_host_time(llm, *, rows, context, steps):
        phases = {"planning": 1.0, "tables": float(context)}
        return HostTimeReport(
            rows=rows, context=context, steps=steps, phases=phases, call_us=5.0, bare_call_us=4.0
        )

    monkeypatch.setattr(engine, "Worker", Started)
    monkeypatch.setattr(engine, "LLM", FakeLLM)
    monkeypatch.setattr(engine, "engine_without_device", FakeLLM)
    monkeypatch.setattr(engine, "measure_host_time", measure_host_time)
    monkeypatch.setattr(engine, "export_random", lambda *_: None)
    monkeypatch.setattr(
        engine, "measure_machine", lambda _: Machine(bytes_per_s=1e9, flops_per_s=1e9)
    )
    monkeypatch.setattr(peers.Peer, "is_installed", lambda *_: True)
    return started


def documented() -> dict[str, object]:
    """The JSON block of the section on `bench engine`; "*" stands for any keys."""
    section = DOCS.read_text().split("### `loongjax bench engine`")[1]
    block = section.split("```")[1]
    block = re.sub(r"\b[A-Z]+: \w+", '"*": 0', block)
    return json.loads(re.sub(r'("\w+")(?=[,}])', r"\1: 0", block))


def shape(found: object, like: object) -> object:
    """Only the keys, and of a list those of its items; "*" where `like` takes any."""
    if isinstance(found, list):
        kinds = [shape(each, like[0] if isinstance(like, list) else None) for each in found]
        assert all(kind == kinds[0] for kind in kinds)
        return kinds[:1]
    if isinstance(found, dict):
        inner = like if isinstance(like, dict) else {}
        if "*" in inner:
            assert found
            return {"*": 0}
        return {key: shape(value, inner.get(key)) for key, value in found.items()}
    return 0


def test_the_report_has_the_fields_that_are_documented(started, tmp_path, capsys):
    assert main(["bench", "engine", "--json", "--quick", "--peers", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shape(report, documented()) == documented()
    assert {cell["dtype"] for cell in report["cells"]} == {"float32", "bfloat16"}
    assert len(report["cells"]) == 2 * 5
    assert set(report["cells"][0]["peers"]) == {peer.name for peer in peers.PEERS}
    assert report["host_us"]["total"] == 1 + 128
    assert report["host_us"]["context_ratio"] == (1 + 65_536) / (1 + 1024)


def test_without_json_all_that_was_measured_is_printed(started, tmp_path, capsys):
    options = ["--quick", "--dtype", "float32", "--peers", str(tmp_path)]
    assert main(["bench", "engine", *options]) == 0
    cells, host, degrees = capsys.readouterr().out.split("\n\n")
    assert len(cells.splitlines()) == 2 + 5
    assert host.startswith("| host us of 8 rows | planning |")
    assert len(degrees.splitlines()) == 3


def test_host_time_as_a_table():
    head, _, row = host_table(HOST).splitlines()
    assert head == (
        "| host us of 8 rows | planning | tables | call | bare call | without device "
        "| context ratio |"
    )
    assert row == "| 1,084 | 119 | 965 | 639 | 523 | 543 | 1.20 |"


needs_binding = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system binds nothing to cores"
)


@needs_binding
def test_every_engine_and_the_floor_get_the_same_cores(started, tmp_path, monkeypatch):
    bound, at_start = [], engine.Worker.__init__
    before = os.sched_getaffinity(0)

    def start(self, *given, **settings):
        bound.append(os.sched_getaffinity(0))
        at_start(self, *given, **settings)

    def machine(dtype):
        bound.append(os.sched_getaffinity(0))
        return Machine(bytes_per_s=1e9, flops_per_s=1e9)

    monkeypatch.setattr(engine.Worker, "__init__", start)
    monkeypatch.setattr(engine, "measure_machine", machine)
    assert main(["bench", "engine", "--quick", "--peers", str(tmp_path)]) == 0
    assert {settings["threads"] for _, settings in started if "threads" in settings} == {2}
    assert bound == [set(sorted(before)[:2])] * len(bound)
    assert len(bound) == len(started) + 2


@needs_binding
def test_a_process_that_is_started_inside_has_the_first_cores_alone():
    before = os.sched_getaffinity(0)
    ask = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    with first_cores(1):
        inside = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        assert inside.split() == [str(min(before))]
    assert os.sched_getaffinity(0) == before


@needs_binding
def test_fewer_cores_than_wanted_are_all():
    before = os.sched_getaffinity(0)
    with first_cores(10_000):
        assert os.sched_getaffinity(0) == before


def test_a_system_that_cannot_bind_says_so(monkeypatch, caplog):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with first_cores(2):
        pass
    assert "binds nothing to 2 of 8 cores" in caplog.text
