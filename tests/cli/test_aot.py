"""`loongjax aot`: what it asks for, prints, and how it ends."""

from __future__ import annotations

import json

import pytest

from loongjax.aot import library
from loongjax.aot.library import AotReport
from loongjax.aot.request import AotRequest
from loongjax.cli.main import main

ARGUMENTS = ["aot", "--target", "v5e:2x4", "--model-shape", "llama3-8b", "--out", "x"]
PROGRAM = {
    "name": "prefill-d8-t4096-r32",
    "overlap": 1.0,
    "compile_s": 3.0,
    "hbm_bytes": {"temporaries": 2_500_000},
    "collective_bytes": 7_000_000,
    "estimated_s": 0.0123,
}


@pytest.fixture
def asked(monkeypatch):
    """Compiles nothing; gives what was asked for."""
    found = {"failed": {}}

    def compile_library(request, out, compilers, *, jobs, on_progress):
        found.update(request=request, jobs=jobs)
        return AotReport(
            target=request.target,
            programs=[PROGRAM],
            kv_tokens={"per_instance": 16, "total": 128},
            failed=found["failed"],
        )

    monkeypatch.setattr(library, "compile_library", compile_library)
    return found


def test_options_become_a_request(asked, capsys):
    more = ["--degrees", "8,1", "--layers", "2", "--pool-slots", "99", "--jobs", "3", "--json"]
    more += ["--max-model-len", "65536", "--quick"]
    assert main(ARGUMENTS + more) == 0
    assert asked["jobs"] == 3
    assert asked["request"] == AotRequest(
        target="v5e:2x4",
        model_shape="llama3-8b",
        degrees=(1, 8),
        layers=2,
        pool_slots=99,
        max_model_len=65_536,
        quick=True,
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["programs"] == [PROGRAM]
    assert report["kv_tokens"] == {"per_instance": 16, "total": 128}


def test_the_table_is_for_people(asked, capsys):
    assert main(ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert "prefill-d8-t4096-r32" in out
    assert "2.5" in out
    assert "12.30 1.00" in out
    assert "16 an instance, 128 in all" in out


def test_a_program_that_does_not_compile_is_a_failure_after_the_report(asked, capsys):
    asked["failed"] = {"decode": "decode does not compile"}
    assert main([*ARGUMENTS, "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["failed"]
    assert "decode does not compile" in printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--jobs", "0"], "--jobs must be at least 1"), (["--layers", "99"], "not 99")],
)
def test_what_cannot_work_is_refused(arguments, words, capsys):
    assert main(ARGUMENTS + arguments) == 2
    assert words in capsys.readouterr().err
