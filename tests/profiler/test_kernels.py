"""`loongjax profile --kernels`: timing, and what is chosen by it."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from loongjax.aot.kernel_cases import KernelCase
from loongjax.cli.main import main
from loongjax.errors import StepError
from loongjax.profiler import kernels as timing
from loongjax.profiler.kernels import fastest, measure_kernels, seconds_of
from pallas_kernels.backends import kernels_of
from pallas_kernels.tuning import tunings

CASE = KernelCase(
    kernel="striped_attention", heads=2, kv_heads=1, head_dim=16, dtype="float32", tokens=32
)
CASES = [replace(CASE, tiles=tiles) for tiles in ((16, 16), (32, 16), (32, 32))]


def test_the_fastest_that_runs_is_chosen():
    times = dict(zip(CASES, (3.0, None, 2.0), strict=True))
    row = fastest(CASES, times.__getitem__)
    assert (row.queries, row.keys, row.seconds) == (32, 32, 2.0)
    assert (row.head_dim, row.itemsize) == (16, 4)
    with pytest.raises(StepError, match="no tiles of striped_attention-float32-h2-g1-d16-t32 run"):
        fastest(CASES, lambda case: None)


def test_a_case_is_timed_as_it_runs():
    seconds = seconds_of(CASES[1], kernels_of("interpret"))
    assert seconds is not None
    assert 0 < seconds < 10


def test_a_chips_table_is_measured(monkeypatch):
    """With a chip's name, and kernels that run here."""

    class Chip:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [Chip()])
    monkeypatch.setattr(timing, "SHAPES", (CASE,))
    monkeypatch.setattr(timing, "candidates", lambda shape, platform: CASES[:2])
    monkeypatch.setattr(timing, "seconds_of", lambda case, kernels: float(case.tiles[0]))
    seen = []
    tuning = measure_kernels(lambda done, total, what: seen.append((done, total)))
    assert (tuning.chip, tuning.method) == ("h100", "measured")
    assert tuning.device_kinds == tunings()["h100"].device_kinds
    assert [row.queries for row in tuning.striped_attention] == [16]
    assert seen == [(0, 1)]


def test_kernels_have_nothing_to_be_timed_on_a_cpu(tmp_path, capsys):
    assert main(["profile", "--kernels", "--out", str(tmp_path / "tiles.json")]) == 2
    assert "timed on a TPU or a GPU, and this is a cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_steps_are_those_of_a_model(tmp_path, capsys):
    assert main(["profile", "--out", str(tmp_path / "cost.json")]) == 2
    assert "whose steps to measure with --model, or measure --kernels" in capsys.readouterr().err
