"""The checks for a chip: on a CPU they say PASS or SKIP, and a wrong kernel says FAIL."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pallas_kernels.backends import kernels_of
from scripts import confirm_on_chip
from scripts.confirm_on_chip import CHECKS, Options

HERE = Options(model="random:tiny", target=None, library=None, model_shape=None)


def verdict(name: str, capsys) -> tuple[bool, str]:
    passes = confirm_on_chip._passes(name, CHECKS[name], HERE)
    return passes, capsys.readouterr().out.split()[0]


@pytest.mark.parametrize(
    "name", ["striped attention is exact", "paged attention is exact", "KV is written in place"]
)
def test_kernels_pass(name, capsys):
    assert verdict(name, capsys) == (True, "PASS")


@pytest.mark.parametrize(
    "name",
    [
        "striped attention through Mosaic GPU is exact",
        "programs are rebound",
        "programs compiled elsewhere load",
        "memory is as reckoned",
    ],
)
def test_what_cannot_be_said_here_is_skipped(name, capsys):
    assert verdict(name, capsys) == (True, "SKIP")


def test_a_wrong_kernel_fails(monkeypatch, capsys):
    right = kernels_of("xla")
    wrong = replace(right, kv_write=lambda pool, rows, slots, *, layer: pool)
    monkeypatch.setattr(confirm_on_chip, "kernels_of", lambda *_: wrong)
    assert verdict("KV is written in place", capsys) == (False, "FAIL")
