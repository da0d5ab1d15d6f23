"""The search for tiles by estimates."""

from __future__ import annotations

import pytest

from loongjax.aot.targets import TARGETS
from loongjax.aot.tuning import DEVICE_KINDS, SHAPES, candidates, estimate_s, first_that_compiles
from loongjax.costmodel.hardware import load_hardware
from loongjax.errors import StepError
from pallas_kernels.tuning import tunings

H100, V5E = load_hardware("h100"), load_hardware("v5e")
SHAPE = SHAPES[1]


def test_the_least_estimate_that_compiles_wins():
    cases = sorted(candidates(SHAPE, "gpu"), key=lambda case: estimate_s(case, H100))
    best = first_that_compiles(SHAPE, H100, lambda case: True)
    assert (best.queries, best.keys) == cases[0].tiles
    second = first_that_compiles(SHAPE, H100, lambda case: case != cases[0])
    assert (second.queries, second.keys) == cases[1].tiles
    assert best.seconds <= second.seconds == estimate_s(cases[1], H100)


def test_a_shape_for_which_nothing_compiles_is_an_error():
    with pytest.raises(StepError, match=r"no tiles of striped_.* compile for Google"):
        first_that_compiles(SHAPE, V5E, lambda case: False)


def test_an_estimate_counts_work_and_steps():
    """Small tiles waste least arithmetic on the diagonal, and pay for their number."""
    by_tiles = {case.tiles: estimate_s(case, V5E) for case in candidates(SHAPE, "tpu")}
    steps = {256: 16 * 16, 1024: 4 * 4}  # of a head's grid, four heads at a time where they fit
    products = 4 * 32 * 128 / V5E.flops_per_s
    wanted = {
        256: products * 256 * 256 * (16 * 17 // 2) + 32 // 4 * steps[256] * V5E.tile_s,
        1024: products * 1024 * 1024 * (4 * 5 // 2) + 32 * steps[1024] * V5E.tile_s,
    }
    for tile, seconds in wanted.items():
        assert by_tiles[tile, tile] == pytest.approx(seconds)


def test_every_target_has_a_name_in_jax():
    """By which a server there finds the table whose tiles programs were compiled with here."""
    assert {target.chip for target in TARGETS} == DEVICE_KINDS.keys()
    for chip, tuning in tunings().items():
        assert tuning.device_kinds == DEVICE_KINDS[chip]
