"""`loongjax bench scheduler`: what it prints, and how it refuses."""

from __future__ import annotations

import json

import pytest

from loongjax.cli.bench_scheduler import exponent
from loongjax.cli.main import main

FEW = ["bench", "scheduler", "--plans", "5"]


def test_json_has_every_case(capsys):
    # Short ones go first, so that more decode than are wanted: enough have to come.
    cases = ["--case", "20,4,2", "--case", "40,8,2"]
    assert main([*FEW, *cases, "--json"]) == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    report = json.loads(line)
    assert report["policy"] == "elastic"
    assert [case["waiting"] for case in report["cases"]] == [20, 40]
    for case in report["cases"]:
        assert case["plans"] == 5
        assert 0.0 < case["p50_ms"] <= case["p99_ms"]
    assert isinstance(report["exponent"], float)


def test_lines_for_people(capsys):
    assert main([*FEW, "--case", "10,4,2", "--policy", "tp"]) == 0
    assert "10 waiting, 4 running, 2 instances: p50" in capsys.readouterr().out


def test_exponent_is_the_slope_of_the_logarithms():
    cases = [
        {"seen": {"waiting": n, "running": 0}, "p50_ms": 0.1 * n**1.5} for n in (10, 100, 1000)
    ]
    assert exponent(cases) == pytest.approx(1.5)
    assert exponent(cases[:1]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "10,4,0"], "must be at least 1"),
        (["--policy", "magic"], "no policy is called 'magic'"),
    ],
)
def test_a_users_mistake_exits_2(capsys, arguments, message):
    assert main([*FEW, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_case_is_three_numbers(capsys):
    with pytest.raises(SystemExit) as failed:
        main([*FEW, "--case", "10,4"])
    assert failed.value.code == 2
    assert "three numbers" in capsys.readouterr().err
