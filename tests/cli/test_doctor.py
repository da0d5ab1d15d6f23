"""`loongjax doctor`: what it tells, and that a second start finds everything on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from loongjax.cli.main import main

FIELDS = {"versions", "devices", "topology", "model", "memory", "buckets", "programs"}
MODEL = ["--model", "random:tiny", "--max-model-len", "100"]
PAIR = [*MODEL, "--instances", "2", "--degrees", "1,2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def doctor(capsys, *arguments: str) -> dict:
    assert main(["doctor", *arguments, "--json"]) == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    return json.loads(line)


def in_new_process(*arguments: str) -> dict:
    """The JSON of a command that starts from nothing but its folder of programs."""
    done = subprocess.run(
        [sys.executable, "-m", "loongjax.cli.main", *arguments, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_json_tells_what_an_engine_would_be_made_of(capsys, tmp_path):
    report = doctor(capsys, *PAIR, "--program-dir", str(tmp_path / "p"), "--block-size", "100")
    assert set(report) == FIELDS
    assert report["devices"]["used"] == 2
    assert report["topology"]["groups"] == {"1": 2, "2": 1}
    memory = report["memory"]
    assert memory["slots"] == 1024
    assert memory["pool_bytes"] == memory["slots"] * memory["slot_bytes"]
    assert memory["tokens"] == {"instance": 1000, "largest_group": 2000, "all": 2000}
    assert memory["weight_bytes"] < memory["available_bytes"]
    assert report["buckets"] == {
        "prefill": [],
        "extend": [128],
        "decode": [1, 8, 32],
        "migrate": [1024],
    }
    programs = report["programs"]
    assert programs["folder"] == str(tmp_path / "p")
    assert (programs["count"], programs["on_disk"], programs["to_compile"]) == (9, 0, 9)
    names = [program["name"] for program in programs["catalogue"]]
    assert len(set(names)) == 9
    assert "decode-d2-t32-r32" in names


def test_a_second_start_compiles_nothing_and_doctor_knows(capsys):
    """The pool's size included, which nobody gave. Each start is a process of its own."""
    command = ["generate", *MODEL, "--prompt", "abc", "--max-tokens", "3"]
    first = in_new_process(*command)
    assert first["programs"]["compiled"] == 2  # those that the prompt needs
    assert first["programs"]["loaded"] == 0
    second = in_new_process(*command)
    assert (second["programs"]["compiled"], second["programs"]["loaded"]) == (0, 2)
    assert second["programs"]["compile_s"] == 0 < second["programs"]["load_s"]
    assert second["token_ids"] == first["token_ids"]
    assert second["pool"] == first["pool"]

    report = in_new_process("doctor", *MODEL)
    assert report["memory"]["origin"] == "stored"
    assert report["memory"]["slots"] == first["pool"]["slots"]
    assert report["memory"]["temporary_bytes"] > 0
    on_disk = {p["name"] for p in report["programs"]["catalogue"] if p["on_disk"]}
    assert on_disk == {"extend-d1-t128-r32", "decode-d1-t1-r1"}


def test_a_table_for_people(capsys):
    assert main(["doctor", *PAIR]) == 0
    printed = capsys.readouterr().out
    for text in ("2 of 1, 1 of 2", "1,024 slots", "to be compiled", "migrate, degree 2   1"):
        assert text in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "random:nothing"], "no random model is called 'nothing'"),
        ([*MODEL, "--degrees", "2"], "must lie in [1, 1]"),
        ([*MODEL, "--pool-slots", str(10**12)], "at most"),
        ([*MODEL, "--trust-library", "/no/such/folder"], "no program library to trust"),
        ([*MODEL, "--program-dir", "/dev/null/programs"], "cannot make /dev/null/programs"),
    ],
)
def test_a_users_mistake_exits_2(capsys, arguments, message):
    assert main(["doctor", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


def test_a_folder_that_others_can_write_is_a_users_mistake(capsys, tmp_path):
    tmp_path.chmod(0o777)
    assert main(["doctor", *MODEL, "--program-dir", str(tmp_path)]) == 2
    assert "can be written by others (mode 777)" in capsys.readouterr().err
