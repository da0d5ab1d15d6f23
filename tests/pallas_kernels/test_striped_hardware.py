"""The ring through the hardware paths of `fold_stripe`, interpreted, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.causal_tiles import Tiles
from pallas_kernels.gpu import striped_attention as gpu
from pallas_kernels.partials import Carry, Partial, empty_carry, finish
from pallas_kernels.tpu import striped_attention as tpu
from tests.pallas_kernels import exact
from tests.pallas_kernels.races import no_races
from tests.pallas_kernels.test_striped_attention import (
    Packing,
    Shape,
    packings,
    random_qkv,
    stripe,
)

RACES = pltpu.InterpretParams(detect_races=True)


@dataclass(frozen=True)
class Path:
    """A hardware path, how it is interpreted, and the shape it is compiled for."""

    shape: Shape
    tiles: Tiles
    on_tpu: bool


PATHS = [
    Path(Shape(32, 0, 9, 3, 16, "float32"), Tiles(8, 8), on_tpu=False),
    Path(Shape(32, 0, 4, 1, 16, "bfloat16", soft_cap=2.0), Tiles(16, 8), on_tpu=False),
    Path(Shape(32, 0, 9, 3, 16, "float32", soft_cap=2.0), Tiles(8, 16), on_tpu=True),
    Path(Shape(32, 0, 4, 4, 16, "bfloat16"), Tiles(16, 8), on_tpu=True),
]


@lru_cache
def compiled(path: Path):
    fold = tpu.fold_stripe if path.on_tpu else gpu.fold_stripe
    return jax.jit(partial(fold, **path.shape.options, tiles=path.tiles, interpret=True))


def ring(fold, qkv, packing: Packing, shape: Shape, window: int | None) -> Partial:
    """Every stripe on every rank; tokens in the order of the prompts."""
    n, total = packing.degree, sum(packing.lengths)
    o = np.zeros((total, shape.heads, shape.head_dim), np.float32)
    lse = np.zeros((total, shape.heads), np.float32)
    stripes = [[stripe(x, packing, rank) for x in qkv] for rank in range(n)]
    for rank in range(n):
        carry = empty_carry((shape.heads, shape.tokens), shape.head_dim)
        for hop in range(n):
            source = (rank - hop) % n
            carry = fold(
                carry,
                stripes[rank][0],
                *stripes[source][1:],
                packing.first(rank, source, window),
                shift=np.int32(rank < source),
                used=np.int32(packing.used),
            )
        local, place = finish(carry), packing.place[rank]
        o[place[place >= 0]] = np.asarray(local.o).transpose(1, 0, 2)[place >= 0]
        lse[place[place >= 0]] = np.asarray(local.lse).T[place >= 0]
    return Partial(o, lse)


def check(fold, path: Path, packing: Packing, window: int | None, seed: int) -> None:
    qkv = random_qkv(packing, path.shape, seed)
    found = ring(fold, qkv, packing, path.shape, window)
    wanted = exact.attention(*qkv, packing.visible(window), **path.shape.options)
    name = "TPU" if path.on_tpu else "GPU"
    exact.assert_near(found, wanted, path.shape.dtype, kernel="striped_attention", path=name)


@pytest.mark.parametrize("path", PATHS, ids=str)
@settings(max_examples=10)
@given(data=st.data(), window=st.none() | st.integers(1, 40), seed=st.integers(0, 9999))
def test_ring_equals_attention_of_the_unstriped_prompts(path, data, window, seed):
    check(compiled(path), path, data.draw(packings(path.shape.tokens)), window, seed)


def test_tpu_copies_do_not_race():
    """Memory that was never written is NaN under this interpreter."""
    path = PATHS[2]
    options = {**path.shape.options, "tiles": path.tiles, "interpret": RACES}
    fold = jax.jit(partial(tpu.fold_stripe, **options))
    with no_races():
        check(fold, path, Packing((9, 30), 2, path.shape.tokens), 13, 7)


@pytest.mark.parametrize("path", [PATHS[0], PATHS[2]], ids=str)
def test_a_key_of_another_prompt_is_never_visible(path):
    packing = Packing((23, 21, 10), 2, path.shape.tokens)
    qkv = random_qkv(packing, path.shape, 2)
    middle = slice(23, 23 + 21)
    before = ring(compiled(path), qkv, packing, path.shape, None)
    for other in qkv[1:]:
        other[:23], other[44:] = 1e30, -1e30
    after = ring(compiled(path), qkv, packing, path.shape, None)
    np.testing.assert_array_equal(before.o[middle], after.o[middle])
    np.testing.assert_array_equal(before.lse[middle], after.lse[middle])


@pytest.mark.parametrize("path", [PATHS[0], PATHS[2]], ids=str)
@pytest.mark.parametrize("used", [0, 11])
def test_queries_that_see_nothing_keep_their_carry(path, used):
    shape = path.shape
    packing = Packing((11,), 1, shape.tokens)
    q, k, v = (stripe(x, packing, 0) for x in random_qkv(packing, shape, 3))
    rows, beyond = (shape.heads, shape.tokens), slice(-(-used // 16) * 16, None)
    carry = Carry(jnp.ones(rows), jnp.full(rows, 2.0), jnp.full((*rows, shape.head_dim), 3.0))
    first = packing.first(0, 0, None)
    after = compiled(path)(carry, q, k, v, first, shift=np.int32(0), used=np.int32(used))
    for old, new in zip(carry, after, strict=True):
        np.testing.assert_array_equal(new[:, beyond], old[:, beyond])
        assert np.array_equal(new[:, :used], old[:, :used]) == (used == 0)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "itemsize", "message"),
    [
        (128, 96, 2, "head_dim 96 must be a power of two"),
        (128, 512, 4, "at most 256 with 4 bytes"),
        (200, 128, 2, "200 tokens is no multiple of 16"),
    ],
)
def test_gpu_says_what_it_cannot_tile(tokens, head_dim, itemsize, message):
    with pytest.raises(ValueError, match=message):
        gpu.tiles_for(tokens, head_dim, itemsize)


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "tiles"),
    [(64, 2, (128, 64)), (128, 2, (128, 64)), (64, 4, (64, 32)), (256, 4, (32, 32))],
)
def test_gpu_tiles_shrink_with_what_a_key_takes(head_dim, itemsize, tiles):
    assert gpu.tiles_for(512, head_dim, itemsize) == tiles
    assert gpu.tiles_for(16, head_dim, itemsize) == (16, 16)


def test_tpu_tiles_divide_the_stripe():
    assert [tpu.tiles_for(tokens)[0] for tokens in (7, 128, 768, 2048)] == [7, 128, 256, 512]
    with pytest.raises(ValueError, match="200 tokens is no multiple of 128"):
        tpu.tiles_for(200)


@pytest.mark.parametrize(("group", "queries", "heads"), [(4, 512, 2), (3, 512, 1), (32, 128, 8)])
def test_tpu_heads_share_keys_as_far_as_they_fit(group, queries, heads):
    assert tpu.heads_at_once(group, queries) == heads
