"""Ten seconds of what `scripts/soak.py` does for minutes."""

from __future__ import annotations

import json

import pytest

import scripts.soak as module
from scripts.soak import main, soak
from scripts.soak_report import Report


def test_random_regrouping_neither_hangs_nor_leaks_nor_says_something_else(tmp_path):
    picture = tmp_path / "end.png"
    report = soak(seconds=10, instances=2, program_dir=tmp_path / "programs", picture=picture)
    assert report.passed, report
    assert report.requests["length"] > 5
    assert report.requests["abort"]
    kinds = {name.split("-")[0] for name in report.steps}
    assert kinds == {"prefill", "decode", "migrate"}
    assert {name.split("-")[1] for name in report.steps} == {"1", "2"}
    assert report.groups == 3
    assert min(report.scale_ups, report.scale_downs, report.moved_tokens) > 0
    assert report.side_by_side > 10
    assert picture.read_bytes().startswith(b"\x89PNG")


class Raising:
    """A policy that breaks."""

    def __init__(self, *, seed: int) -> None: ...

    def schedule(self, now: float, snapshot: object) -> None:
        raise ZeroDivisionError("sabotage")


def test_a_broken_policy_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(module, "RandomPolicy", Raising)
    monkeypatch.setattr(module, "_warm_up", lambda *_: None)
    monkeypatch.setattr(module, "PROMPTS", 1)
    assert main(["--seconds", "0.5", "--instances", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"]
    assert found["hung"] == 0
    assert "an engine died" in found["problems"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests": {}},
        {"requests": {"length": 9, "error": 1}},
        {"differing": 1},
        {"hung": 1},
        {"slots_left": 1},
        {"steps": {"failed": 1}},
        {"problems": ["an engine died"]},
    ],
)
def test_whatever_is_wrong_is_a_failure(wrong):
    right = {"requests": {"length": 9, "abort": 1}, "steps": {"decode-1": 5}}
    assert Report(**right).passed
    assert not Report(**{**right, **wrong}).passed


@pytest.mark.parametrize("flag", ["--instances", "--engines", "--seconds"])
def test_a_mistake_is_told_in_a_line(flag, capsys):
    assert main([flag, "0"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert "must be positive" in told.err


def test_a_picture_needs_matplotlib_before_the_soak(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert main(["--picture", str(tmp_path / "end.png")]) == 2
    assert "install matplotlib" in capsys.readouterr().err
