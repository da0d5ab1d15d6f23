"""Which tiles have work, against all pairs of a small stripe; and what a grid counts in all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.causal_tiles import Tiles, causal_pairs, key_tiles
from pallas_kernels.gpu import striped_attention as gpu
from pallas_kernels.partials import empty_carry
from pallas_kernels.tpu import striped_attention as tpu


@given(
    intervals=st.lists(st.tuples(st.integers(0, 20), st.integers(-1, 20)), min_size=4, max_size=4),
    keys=st.sampled_from((1, 4, 8)),
)
def test_tiles_hold_every_visible_pair_and_whole_ones_no_other(intervals, keys):
    first, last = (np.array(column, np.int32) for column in zip(*intervals, strict=True))
    bounds = [int(bound) for bound in key_tiles(jnp.array(first), jnp.array(last), keys)]
    assert bounds == sorted(bounds)
    begin, inner, diagonal, end = bounds
    key = np.arange(32)
    visible = (key >= first[:, None]) & (key <= last[:, None])
    by_tile = visible.reshape(len(first), -1, keys)
    has_work = by_tile.any((0, 2))
    assert not has_work[:begin].any()
    assert not has_work[end:].any()
    assert by_tile[:, inner:diagonal].all()
    if has_work.any():
        assert has_work[begin]
        assert has_work[end - 1]
    else:
        assert begin == end


@pytest.mark.parametrize("tiles", [Tiles(16, 16), Tiles(16, 8), Tiles(8, 16)])
def test_pairs_are_those_of_one_causal_prompt(tiles):
    queries, keys = np.arange(64)[:, None] // tiles.queries, np.arange(64) // tiles.keys
    seen = np.arange(64)[:, None] >= np.arange(64)
    wanted = {(q, k) for q, k, s in np.broadcast(queries, keys, seen) if s}
    assert causal_pairs(64, tiles) == len(wanted)


def test_a_long_stripe_computes_little_more_than_it_must():
    """128K tokens at degree 8: all hops have the same tiles; the shift takes off a diagonal."""
    tokens = 131_072 // 8
    for tiles in (tpu.tiles_for(tokens), gpu.tiles_for(tokens, 128, 2)):
        computed = causal_pairs(tokens, tiles) * tiles.queries * tiles.keys
        assert computed <= 1.1 * tokens * (tokens + 1) / 2


@pytest.mark.parametrize(("kernel", "tiles"), [(tpu, Tiles(16, 8)), (gpu, Tiles(16, 16))])
def test_cost_estimate_counts_the_grid(kernel, tiles):
    """Of one causal prompt; a program on TPU has several heads, on GPU one."""
    heads, kv_heads, tokens, size = 6, 2, 64, 16
    q, kv = (jnp.zeros((count, tokens, size)) for count in (heads, kv_heads))
    traced = jax.make_jaxpr(
        lambda: kernel.fold_stripe(
            empty_carry((heads, tokens), size),
            *(q, kv, kv, jnp.zeros(tokens, jnp.int32)),
            shift=jnp.int32(0),
            used=jnp.int32(tokens),
            scale=1.0,
            tiles=tiles,
        )
    )()
    (call,) = (eqn for eqn in traced.eqns if eqn.primitive.name == "pallas_call")
    cost = call.params["cost_estimate"]
    first, last = jnp.zeros(tokens, jnp.int32), jnp.arange(tokens, dtype=jnp.int32)
    by_tile = (tokens // tiles.queries, tiles.queries)
    bounds = key_tiles(first.reshape(by_tile), last.reshape(by_tile), tiles.keys, axis=1)
    computed = int((bounds.end - bounds.first).sum()) * tiles.queries * tiles.keys
    assert cost.flops == 4 * heads * size * computed
    assert cost.transcendentals == heads * computed
