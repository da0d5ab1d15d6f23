"""The script of the paper's evaluation: cells are made once, and end in tables and pictures."""

from __future__ import annotations

import csv
import json

import pytest

from loongjax.simulator import draw_jobs, fluid_rate
from scripts import reproduce_paper
from scripts.reproduce_paper import (
    WITHIN_LOONGSERVE,
    Cell,
    Engine,
    Paper,
    main,
    maximum_rate,
    saturated_rate,
)


def test_overheads_are_written_as_a_table_and_a_picture(tmp_path, capsys):
    main(["--out", str(tmp_path), "--only", "fig14"])
    with (tmp_path / "fig14.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    ratios = {(row["row"], row["column"]): float(row["value"]) for row in rows}
    assert ratios["1024x10", "4 masters"] < ratios["1024x10", "2 masters"] < 1.0
    assert (tmp_path / "fig14.png").read_bytes().startswith(b"\x89PNG")
    assert "[8/8] fig14" in capsys.readouterr().out


def test_a_broken_run_goes_on_where_it_was(tmp_path):
    made = []

    def make() -> float:
        made.append(1)
        return 0.5

    cell = Cell(figure="f", row="a:b", column="c d", published=None, make=make)
    assert [Paper(tmp_path, 10, 0).value(cell) for _ in range(2)] == [0.5, 0.5]
    assert len(made) == 1
    assert Paper(tmp_path, 20, 0).value(cell) == 0.5
    assert len(made) == 2
    (path,) = (tmp_path / "cells").iterdir()
    assert json.loads(path.read_text())["settings"] == {"requests": 20, "seed": 0}


def test_every_cell_has_a_name_of_its_own(tmp_path):
    cells = list(Paper(tmp_path, 10, 0).cells())
    assert len({cell.name for cell in cells}) == len(cells)
    figures = {"curves", "goodput", "fig10", "fig11", "fig12", "fig13", "fig14"}
    assert {cell.figure for cell in cells} == figures


def test_maximum_rate_is_where_the_limit_is_crossed(monkeypatch):
    """Of a cluster whose latency [ms] is the rate at which requests come."""
    jobs = draw_jobs("leval", 200, rate=1.0, seed=0)

    def rate_of(jobs, policy, deployment):
        return (len(jobs) - 1) / (jobs[-1].arrival - jobs[0].arrival)

    monkeypatch.setattr(reproduce_paper, "mean_ms", rate_of)
    deployment = Paper.deployment("tp", None)
    bound = fluid_rate(jobs, deployment)
    saturated = saturated_rate(jobs, "tp", deployment)
    assert 0.5 * bound < saturated <= bound
    for part in (0.3, 0.5, 2.0):
        found = maximum_rate(jobs, "tp", deployment, part * bound)
        assert found == pytest.approx(min(part * bound, saturated), abs=0.02 * bound)


@pytest.mark.parametrize("mode", ["published", "fair"])
def test_loongserve_is_calibrated_only_where_that_is_said(tmp_path, mode):
    engine = Paper(tmp_path, 10, 0).engine("loongserve", mode)
    assert engine == (None if mode == "fair" else WITHIN_LOONGSERVE)


def test_a_step_time_below_zero_makes_steps_with_decodes_faster():
    """Of an engine whose published rate is higher than the cost model allows."""
    slow, fast = (
        Paper.deployment("chunked_prefill", Engine.of_step(seconds)) for seconds in (0.002, -0.004)
    )
    assert (slow.cost.host.step_s, fast.cost.host.step_s) == (0.002, 0.0)
    constants = [d.cost.prefill_fit(1).resumed_constant_s for d in (slow, fast)]
    assert constants[0] - constants[1] == pytest.approx(0.004)
    assert fast.limits.steps_ahead == 0


def test_what_the_paper_ran_within_loongserve_has_its_host(tmp_path, monkeypatch):
    engines = []

    def record(policy, engine, *rest, **cut):
        engines.append(engine)
        raise InterruptedError

    monkeypatch.setattr(Paper, "deployment", staticmethod(record))
    with pytest.raises(InterruptedError):
        Paper(tmp_path, 10, 0).goodput("tp", "zipf:1.0", "fair")
    monkeypatch.setattr(Paper, "value", lambda self, cell: 0.1)
    with pytest.raises(InterruptedError):
        Paper(tmp_path, 10, 0).goodput("tp", "zipf:1.0", "published")
    with pytest.raises(InterruptedError):
        Paper(tmp_path, 10, 0).goodput("chunked_prefill", "zipf:1.0", "published")
    assert engines == [None, WITHIN_LOONGSERVE, Engine.of_step(0.1)]
