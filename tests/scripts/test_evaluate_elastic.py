"""The script that measures `elastic`: its cells, changed constants, tables and pictures."""

from __future__ import annotations

import csv

import pytest

from loongjax.costmodel import ChunkWork, DecodeWork
from loongjax.scheduler.policies.elastic import clock, order
from loongjax.simulator import Goodput
from scripts import elastic_report, evaluate_elastic
from scripts.evaluate_elastic import (
    ABLATIONS,
    CONSTANTS,
    Cell,
    Evaluation,
    changed,
    main,
    wrong,
)
from tests.costmodel.sibs import toy_sib


def table(path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def made_up(monkeypatch):
    """Cells are quick: goodput is longer for longer names of policies."""

    def goodput(self, workload, policy, seed, **conditions):
        sustained = 1.0 + len(policy) / 100 + seed
        names = ("paper", "every_class", "sustainable", "saturated")
        return dict.fromkeys(names, sustained) | {"bound": 2.0}

    def served(self, workload, policy, seed, part, lasting=1.0):
        times = {"p50": part, "p99": 2 * part, "mean": part}
        return {"<4k": times, "attained": 0.5 + 0.25 * seed, "work": part / lasting}

    monkeypatch.setattr(Evaluation, "goodput", goodput)
    monkeypatch.setattr(Evaluation, "served", served)
    monkeypatch.setattr(evaluate_elastic, "SENSITIVE", ("mixed", "leval"))


@pytest.fixture
def few(monkeypatch):
    """So few jobs that a run takes seconds, types checked."""
    monkeypatch.setattr(Evaluation, "_count", lambda self, jobs, lasting: 20)


def test_targets_stand_beside_what_was_reached(made_up, tmp_path):
    main(["--out", str(tmp_path), "--only", "targets", "--seeds", "2"])
    head, *rows = table(tmp_path / "targets.csv")
    assert [row[0] for row in rows] == list(evaluate_elastic.WORKLOADS)
    mixed = dict(zip(head, rows[3], strict=True))
    assert float(mixed["elastic"]) == pytest.approx(1.57)
    assert float(mixed["loongserve"]) == pytest.approx(1.6)


def test_saturation_is_measured_for_longer(made_up, tmp_path):
    main(["--out", str(tmp_path), "--only", "saturated", "--seeds", "2"])
    rows = table(tmp_path / "saturated.csv")[1:]
    assert rows == [[workload, *3 * ["0.250"]] for workload in evaluate_elastic.SATURATED]
    evaluation = Evaluation(tmp_path, 1000.0, 1, None)
    few, many = (evaluation.jobs("mixed", 0, lasting=lasting) for lasting in (1.0, 4.0))
    assert len(many) == pytest.approx(4 * len(few), rel=0.01)


def test_sensitivity_is_drawn_for_every_constant(made_up, tmp_path):
    main(["--out", str(tmp_path), "--only", "sensitivity", "--seeds", "2"])
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    rows = table(tmp_path / "sensitivity.csv")[1:]
    assert len(rows) == 2 * (1 + 2 * (len(CONSTANTS) + len(evaluate_elastic.SETTINGS)))
    assert rows[0] == ["mixed", "as it is", "0.625", "0.800"], "the mean of both seeds"


def test_an_ablation_tells_goodput_and_how_long_short_prompts_wait(made_up, tmp_path, capsys):
    main(["--out", str(tmp_path), "--only", "ablation"])
    head, *rows = table(tmp_path / "ablation.csv")
    assert len(rows) == 2 * len(ABLATIONS)
    first = dict(zip(head, rows[0], strict=True))
    assert (first["p50 below 4K [s]"], first["p99 below 4K [s]"]) == ("0.6", "1.2")
    assert first["p50 above 128K [s]"] == ""
    capsys.readouterr()
    main(["--out", str(tmp_path), "--only", "ablation"])
    assert ", 0 s" in capsys.readouterr().out, "made once"


def test_a_cell_that_another_process_makes_is_left_out(tmp_path):
    evaluation = Evaluation(tmp_path, 10.0, 1, None)
    cell = Cell(part="p", workload="w", column="c", seed=0, make=lambda: {"sustainable": 1.0})
    lock = tmp_path / "making" / cell.name
    lock.touch()
    assert evaluation.value(cell) is None
    lock.unlink()
    assert evaluation.value(cell) == {"sustainable": 1.0, "seconds": 10.0}
    assert not lock.exists()


def test_a_cell_is_made_once_for_a_length(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return {"sustainable": float(len(made))}

    cell = Cell(part="p", workload="w", column="c", seed=0, make=make)
    for seconds, sustained in ((10.0, 1.0), (20.0, 2.0), (10.0, 1.0)):
        value = Evaluation(tmp_path, seconds, 1, None).value(cell)
        assert value == {"sustainable": sustained, "seconds": seconds}
    assert made == [0, 1]


def test_what_is_made_can_be_reported_without_making_more(made_up, tmp_path):
    main(["--out", str(tmp_path), "--only", "targets", "--workload", "mixed"])
    main(["--out", str(tmp_path), "--only", "targets", "--made"])
    assert [row[0] for row in table(tmp_path / "targets.csv")[1:]] == ["mixed"]


def test_other_seeds_use_the_length_of_chunks_that_was_best(made_up, tmp_path):
    main(["--out", str(tmp_path), "--only", "targets", "--workload", "mixed", "--seeds", "2"])
    made = Evaluation(tmp_path, 1000.0, 2, None).made()
    seeds = [name.rpartition("-")[2] for name in made if "chunked" in name]
    assert sorted(seeds) == ["0", "0", "1"]


def test_chunks_of_a_length_that_only_one_seed_tried_do_not_count():
    one, two = [{"sustainable": 9.0}], [{"sustainable": 1.0}, {"sustainable": 2.0}]
    found = {("targets", "w", "chunked:1"): one, ("targets", "w", "chunked:2"): two}
    assert elastic_report.chunked_rate(found, "w") == 1.5


def test_a_search_begins_where_another_seed_ended(tmp_path):
    evaluation = Evaluation(tmp_path, 10.0, 2, None)
    assert evaluation.known("mixed", "elastic") == []
    value = {"paper": 1.0, "every_class": 0.5, "bound": 2.0}
    cell = Cell(part="targets", workload="mixed", column="elastic", seed=1, make=lambda: value)
    evaluation.value(cell)
    assert evaluation.known("mixed", "elastic") == [0.5, 0.25]


def test_a_long_search_begins_where_a_part_of_it_ended(few, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_elastic, "LONG", 20)
    monkeypatch.setattr(evaluate_elastic, "PILOT", 1)
    sought = []

    def search(jobs, deployment, policy, objective, *, precision, near, drains):
        sought.append((precision, list(near)))
        found = {"paper": 1.0, "every_class": 0.5, "sustainable": 0.5, "saturated": 1.0}
        return Goodput(**found, bound=2.0, probes=())

    monkeypatch.setattr(evaluate_elastic, "find_goodput", search)
    Evaluation(tmp_path, 10.0, 2, None).goodput("lveval", "elastic", 0)
    assert sought == [(0.05, []), (0.02, [0.5, 0.25])]


def test_constants_are_what_they_were_afterwards():
    before = order._EVENNESS, clock._RESERVE

    def fail():
        with changed(((order, "_EVENNESS", 0.0), (clock, "_RESERVE", 0.1))):
            assert (order._EVENNESS, clock._RESERVE) == (0.0, 0.1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert before == (order._EVENNESS, clock._RESERVE)
    assert all(hasattr(module, name) for module, name in CONSTANTS)


def test_a_wrong_cost_model_is_wrong_by_its_factors():
    right, found = toy_sib(), wrong(toy_sib(), 1.3, 0.7)
    chunks, work = [ChunkWork(100, 50)], DecodeWork(3, 200, 1)
    assert found.prefill(2, chunks) == pytest.approx(1.3 * right.prefill(2, chunks))
    assert found.decode(2, work) == pytest.approx(0.7 * right.decode(2, work))


@pytest.mark.parametrize("name", ABLATIONS)
def test_without_any_idea_everybody_is_served(name, few, tmp_path):
    policy, changes = ABLATIONS[name]
    evaluation = Evaluation(tmp_path, 20.0, 1, None)
    with changed(changes):
        found = evaluation.served("lveval", policy, 1, 0.9)
    assert found[">128k"]["p99"] >= found[">128k"]["p50"] > 0.0


@pytest.mark.parametrize(
    "conditions", [{"lost": True}, {"cv": 3.0}, {"limit": 2048}, {"factors": (1.3, 0.7)}]
)
def test_an_instance_is_lost_and_bursts_come(conditions, few, tmp_path):
    evaluation = Evaluation(tmp_path, 10.0, 1, None)
    found = evaluation.goodput("lveval", "elastic", 0, precision=0.5, **conditions)
    assert 0.0 <= found["sustainable"] <= found["bound"]
