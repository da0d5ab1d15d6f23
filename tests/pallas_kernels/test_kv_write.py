"""Kept tokens land in their slots; nothing else of the pool changes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_write import kv_write

LAYERS, SLOTS, TRASH, HEADS, HEAD_DIM = 2, 20, 20, 2, 4

write = jax.jit(kv_write, donate_argnums=0)


def pool_of(dtype: str) -> np.ndarray:
    count = LAYERS * (SLOTS + 1) * HEADS * HEAD_DIM
    return -np.arange(count).reshape(LAYERS, SLOTS + 1, HEADS, HEAD_DIM).astype(dtype)


def check(slots: list[int], layer: int, dtype: str) -> None:
    pool = pool_of(dtype)
    rows = 1 + np.arange(len(slots) * HEADS * HEAD_DIM).reshape(-1, HEADS, HEAD_DIM).astype(dtype)
    found = np.asarray(write(jax.numpy.array(pool), rows, np.int32(slots), layer=np.int32(layer)))
    for row, slot in zip(rows, slots, strict=True):
        pool[layer, slot] = row
    np.testing.assert_array_equal(found[:, :TRASH], pool[:, :TRASH])
    np.testing.assert_array_equal(found[1 - layer], pool[1 - layer])


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@settings(max_examples=20)
@given(data=st.data(), layer=st.integers(0, LAYERS - 1))
def test_kept_tokens_land_in_their_slots_and_others_nowhere(tokens, dtype, data, layer):
    order = data.draw(st.permutations(range(SLOTS)))
    kept = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    check([order[t] if kept[t] else TRASH for t in range(tokens)], layer, dtype)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_donated_pool_is_written_in_place(tokens):
    pool = jax.device_put(jax.numpy.zeros((LAYERS, SLOTS + 1, HEADS, HEAD_DIM)), jax.devices()[3])
    before = pool.unsafe_buffer_pointer()
    rows = jax.device_put(np.ones((tokens, HEADS, HEAD_DIM), np.float32), jax.devices()[3])
    after = write(pool, rows, np.arange(tokens, dtype=np.int32), layer=0)
    assert after.unsafe_buffer_pointer() == before
    assert pool.is_deleted()
