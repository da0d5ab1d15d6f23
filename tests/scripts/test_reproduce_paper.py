"""The script of the paper's evaluation: cells are made once, and end in tables and pictures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest

from loongjax.simulator import draw_jobs, fluid_rate
from scripts import reproduce_paper
from scripts.reproduce_paper import (
    WITHIN_LOONGSERVE,
    Cell,
    Paper,
    main,
    maximum_rate,
    saturated_rate,
    slower,
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


def test_published_engines_have_another_host_attention_and_fused_steps():
    plain = Paper.deployment("chunked_prefill", None).cost.prefill_fit(1)
    engine = replace(slower("chunked_prefill", 0.004), attention=2.0)
    fast = Paper.deployment("chunked_prefill", engine)
    changed = fast.cost.prefill_fit(1)
    assert changed.resumed_constant_s == 0.004
    assert (changed.square_s, changed.token_s) == (2.0 * plain.square_s, plain.token_s)
    assert fast.limits.steps_ahead == 0
    slow = Paper.deployment("tp", slower("tp", 0.002))
    assert (slow.cost.host.step_s, slow.cost.host.row_s) == (0.0125, 0.002)


def test_a_baseline_is_as_slow_as_its_published_rate_says(tmp_path, monkeypatch):
    """Of one that keeps a rate of 1 / (100 x its host's time for a request)."""

    def rate(deployment):
        return 0.01 / deployment.cost.host.row_s

    monkeypatch.setattr(
        reproduce_paper, "is_in_time", lambda jobs, policy, d, limit, wanted: rate(d) >= wanted
    )
    monkeypatch.setattr(reproduce_paper, "saturated_rate", lambda jobs, policy, d: rate(d))
    found = Paper(tmp_path, 20, 0).calibrate_host("tp")
    assert found == pytest.approx(0.01 / 6.351, abs=5e-3 / 2**8)


def test_what_the_paper_ran_within_loongserve_has_its_host(tmp_path, monkeypatch):
    engines, chunked = [], "chunked_prefill"

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
        Paper(tmp_path, 10, 0).goodput(chunked, "zipf:1.0", "published")
    assert engines == [None, WITHIN_LOONGSERVE, replace(slower(chunked, 0.1), attention=0.1)]
