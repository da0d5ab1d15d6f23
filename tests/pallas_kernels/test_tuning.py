"""Tables of tiles: what they hold, whose they are, and that kernels use them."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends, tuning
from pallas_kernels.backends import kernels_of
from pallas_kernels.partials import empty_carry
from pallas_kernels.tuning import TunedTiles, Tuning, chip_of, tuning_from, tunings

SMALL = Tuning(
    chip="small",
    device_kinds=("tpu small",),
    method="measured",
    striped_attention=(TunedTiles(head_dim=16, itemsize=4, queries=32, keys=64, seconds=1e-6),),
)


def test_a_table_is_what_its_file_says():
    assert tuning_from(SMALL.to_json()) == SMALL


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"striped_attention": [{"head_dim": 8}]}, "no tuning table: .*missing"),
        ({"chips": "two"}, "no tuning table: .*chips"),
    ],
)
def test_what_is_no_table_is_refused(change, fault):
    with pytest.raises(ValueError, match=fault):
        tuning_from(json.dumps({**json.loads(SMALL.to_json()), **change}))


def test_tiles_are_powers_of_two():
    text = SMALL.to_json().replace('"queries": 32', '"queries": 96')
    with pytest.raises(ValueError, match="powers of two, not 96 x 64"):
        tuning_from(text)


def test_tiles_shrink_with_the_stripe_and_short_stripes_have_their_own():
    wide = tuning_from(SMALL.to_json().replace('"queries": 32', '"queries": 1024'))
    assert wide.tiles(16, 4, 4096) == (1024, 64)
    assert wide.tiles(16, 4, 768) == (256, 64)
    assert wide.tiles(16, 4, 64) is None
    assert wide.tiles(16, 2, 4096) is None


def test_gpus_are_known_by_the_longest_name_that_fits(monkeypatch):
    small = replace(SMALL, device_kinds=("gpu small",))
    larger = replace(SMALL, chip="larger", device_kinds=("gpu small plus", "gpu big"))
    monkeypatch.setattr(tuning, "tunings", lambda: {"small": small, "larger": larger})
    kinds = ["GPU small", "GPU small2", "GPU Small plus", "GPU big 80GB", "cpu"]
    assert [chip_of(kind) for kind in kinds] == ["small", "small", "larger", "larger", ""]


def test_tpus_are_known_by_their_whole_name(monkeypatch):
    """Else a v5e, "TPU v5 lite", would take the tiles of a v5p as long as it has no table."""
    v5p = replace(SMALL, chip="v5p", device_kinds=("tpu v5", "tpu v5p"))
    monkeypatch.setattr(tuning, "tunings", lambda: {"v5p": v5p})
    kinds = ["TPU v5", "TPU v5p", "TPU v5 lite", "TPU v5e"]
    assert [chip_of(kind) for kind in kinds] == ["v5p", "v5p", "", ""]


def test_a_table_has_the_head_sizes_of_models():
    for found in tunings().values():
        shapes = {(row.head_dim, row.itemsize) for row in found.striped_attention}
        assert shapes == {(64, 2), (128, 2), (256, 2), (64, 4), (128, 4)}, found.chip


def test_kernels_use_the_tiles_of_their_chip(monkeypatch):
    """Whoever counts tiles counts the same, and the numbers stay what they are."""
    monkeypatch.setattr(backends, "tunings", lambda: {"small": SMALL})
    monkeypatch.setattr(backends, "_TUNED", ("interpret",))
    plain = kernels_of("interpret")
    tuned = kernels_of.__wrapped__("interpret", "small")
    assert plain.fold_tiles(128, 16, 4) == (64, 32)
    assert tuned.fold_tiles(128, 16, 4) == (32, 64)
    assert tuned.fold_tiles(128, 32, 4) == plain.fold_tiles(128, 32, 4)

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 128, 16)), jnp.float32) for _ in range(3))
    carry, first = empty_carry((1, 128), 16), jnp.zeros(128, jnp.int32)

    def run(kernels):
        def fold(*arrays):
            options = {"shift": jnp.int32(0), "used": jnp.int32(128), "scale": 0.3}
            return kernels.fold_stripe(*arrays, **options)

        grid = str(jax.make_jaxpr(fold)(carry, q, k, v, first))
        return grid.count("grid=(4, 1)"), fold(carry, q, k, v, first)

    (times, found), (_, wanted) = run(tuned), run(plain)
    assert times == 1
    np.testing.assert_allclose(found.o, wanted.o, rtol=1e-5, atol=1e-6)
