"""The hardware paths of `kv_write`, interpreted: rows land in their slots, and nothing else."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gpu import kv_write as gpu
from pallas_kernels.tpu import kv_write as tpu
from tests.pallas_kernels.races import no_races

LAYERS, SLOTS, HEADS, HEAD_DIM = 2, 60, 3, 4
RACES = pltpu.InterpretParams(detect_races=True)
PATHS = {"gpu": partial(gpu.kv_write, interpret=True), "tpu": partial(tpu.kv_write, interpret=True)}
WRITES = {name: jax.jit(path, donate_argnums=0) for name, path in PATHS.items()}


def check(write, slots: list[int], layer: int, dtype: str) -> None:
    count = LAYERS * (SLOTS + 1) * HEADS * HEAD_DIM
    pool = -np.arange(count).reshape(LAYERS, SLOTS + 1, HEADS, HEAD_DIM).astype(dtype)
    rows = 1 + np.arange(len(slots) * HEADS * HEAD_DIM).reshape(-1, HEADS, HEAD_DIM).astype(dtype)
    found = np.asarray(write(jnp.array(pool), rows, np.int32(slots), layer=np.int32(layer)))
    for row, slot in zip(rows, slots, strict=True):
        if slot < SLOTS:
            pool[layer, slot] = row
    np.testing.assert_array_equal(found, pool)


@pytest.mark.parametrize("tokens", [1, 7, 32])
@pytest.mark.parametrize("path", WRITES)
@settings(max_examples=20)
@given(data=st.data(), layer=st.integers(0, LAYERS - 1))
def test_kept_tokens_land_in_their_slots_and_others_nowhere(path, tokens, data, layer):
    """Slots are drawn in runs, as allocators give them."""
    run = data.draw(st.sampled_from((1, 16)))
    order = [
        start + i for start in data.draw(st.permutations(range(0, 48, run))) for i in range(run)
    ]
    kept = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens) | st.none())
    slots = [slot if kept is None or kept[t] else SLOTS for t, slot in enumerate(order[:tokens])]
    check(WRITES[path], slots, layer, "float32" if run == 1 else "uint16")


def test_tpu_copies_do_not_race():
    with no_races():
        check(
            jax.jit(partial(tpu.kv_write, interpret=RACES)),
            [*range(16), *range(40, 24, -1)],
            1,
            "float32",
        )


@pytest.mark.parametrize(
    ("slots", "bits"), [(2**20, 64), (2**10, 32)], ids=["beyond 2^31 elements", "small"]
)
def test_gpu_offsets_are_as_wide_as_the_pool_needs(slots, bits, capsys, monkeypatch):
    """A slot's offset is slot * G * D elements, layers come on top."""
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, debug=True))
    pool = jax.ShapeDtypeStruct((32, slots, 8, 128), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((16, 8, 128), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((16,), jnp.int32)
    traced = jax.jit(partial(gpu.kv_write, layer=31)).trace(pool, rows, index)
    traced.lower(lowering_platforms=("cuda",))
    lines = capsys.readouterr().out.splitlines()
    address = [line for line in lines if "tt.addptr" in line][-1]
    assert f"xi{bits}>" in address
    of_dimensions = [line for line in lines if "arith.muli" in line][-len(pool.shape) :]
    assert all(re.search(rf"[x ]i{bits}\b", line) for line in of_dimensions), of_dimensions


def test_the_race_detector_can_fail():
    """Two rows for one slot, which no allocator gives."""
    write = jax.jit(partial(tpu.kv_write, interpret=RACES))
    with pytest.raises(AssertionError), no_races():
        check(write, [5, 5], 0, "float32")
