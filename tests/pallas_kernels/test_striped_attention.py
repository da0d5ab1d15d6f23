"""A ring over stripes of packed prompts gives the attention of the prompts as they were."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import reference
from pallas_kernels.partials import Carry, Partial, empty_carry, finish
from pallas_kernels.striped_attention import fold_stripe, tile_size
from tests.pallas_kernels import exact
from tests.pallas_kernels.cases import assert_close, draw, rounding_bounds


@dataclass(frozen=True)
class Shape:
    """Local tokens (their tile), query heads, KV heads, head size, dtype: what is compiled."""

    tokens: int
    tile: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    soft_cap: float | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def options(self) -> dict:
        return {"scale": self.scale, "soft_cap": self.soft_cap}


SHAPES = [
    Shape(7, 1, 4, 2, 16, "float32"),
    Shape(12, 4, 4, 1, 8, "float32"),
    Shape(48, 16, 9, 3, 16, "float32", soft_cap=2.0),
    Shape(64, 64, 4, 4, 16, "float32"),
    Shape(20, 4, 9, 3, 8, "bfloat16"),
    Shape(96, 32, 4, 2, 16, "bfloat16", soft_cap=2.0),
]
MAX_DEGREE = 4
WIDE = Shape(512, 256, 2, 1, 8, "float32")


@dataclass(frozen=True)
class Packing:
    """Prompts of these lengths, striped over `degree` ranks, one behind the other.

    `place[r][i]` is the token (counted over all prompts) at local index i of rank r, or -1.
    """

    lengths: tuple[int, ...]
    degree: int
    tokens: int

    @property
    def used(self) -> int:
        return sum(-(-length // self.degree) for length in self.lengths)

    @property
    def place(self) -> np.ndarray:
        place = np.full((self.degree, self.tokens), -1)
        at = before = 0
        for length in self.lengths:
            for token in range(length):
                place[token % self.degree, at + token // self.degree] = before + token
            at += -(-length // self.degree)
            before += length
        return place

    def visible(self, window: int | None) -> np.ndarray:
        """Who sees whom, on the prompts as they were."""
        prompt = np.repeat(np.arange(len(self.lengths)), self.lengths)
        position = np.concatenate([np.arange(length) for length in self.lengths])
        back = position[:, None] - position
        seen = (prompt[:, None] == prompt) & (back >= 0)
        return seen if window is None else seen & (back < window)

    def first(self, rank: int, source: int, window: int | None) -> np.ndarray:
        """The first local key of `source` that each local query of `rank` may see."""
        first, at = np.arange(self.tokens, dtype=np.int32), 0
        for length in self.lengths:
            local = -(-length // self.degree)
            token = np.arange(local) * self.degree
            back = (token + rank)[:, None] - (token + source)
            first[at : at + local] = at if window is None else at + (back >= window).sum(1)
            at += local
        return first


@st.composite
def packings(draw_from, tokens: int) -> Packing:
    degree = draw_from(st.integers(1, MAX_DEGREE))
    room, lengths = tokens, []
    for _ in range(draw_from(st.integers(1, 4))):
        if room:
            lengths.append(draw_from(st.integers(1, room * degree)))
            room -= -(-lengths[-1] // degree)
    return Packing(tuple(lengths), degree, tokens)


@lru_cache
def compiled_reference(shape: Shape):
    return jax.jit(partial(reference.attention, **shape.options))


@lru_cache
def compiled(shape: Shape):
    return jax.jit(partial(fold_stripe, **shape.options))


def random_qkv(packing: Packing, shape: Shape, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    tokens = sum(packing.lengths)
    return [draw(rng, (tokens, h, shape.head_dim), shape.dtype) for h in heads]


def stripe(values: np.ndarray, packing: Packing, rank: int) -> np.ndarray:
    """`[heads, local tokens, D]` of a rank; large values pad prompts, NaN stands beyond."""
    place = packing.place[rank]
    found = np.where((place >= 0)[:, None, None], values[place], 1e4).astype(values.dtype)
    found[packing.used :] = np.nan
    return found.transpose(1, 0, 2)


def ring(qkv, packing: Packing, shape: Shape, window: int | None) -> Partial:
    """Folds every stripe on every rank as the ring brings them; tokens in prompt order."""
    fold, n = compiled(shape), packing.degree
    total = sum(packing.lengths)
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
        local = finish(carry)
        place = packing.place[rank]
        o[place[place >= 0]] = np.asarray(local.o).transpose(1, 0, 2)[place >= 0]
        lse[place[place >= 0]] = np.asarray(local.lse).T[place >= 0]
    return Partial(o, lse)


def whole(qkv, packing: Packing, shape: Shape, window: int | None) -> Partial:
    """The reference on the prompts as they were, padded to one shape for all packings."""
    total, padded = sum(packing.lengths), MAX_DEGREE * shape.tokens
    visible = np.zeros((padded, padded), bool)
    visible[:total, :total] = packing.visible(window)
    room = ((0, padded - total), (0, 0), (0, 0))
    o, lse = compiled_reference(shape)(*(np.pad(x, room) for x in qkv), visible)
    return Partial(np.asarray(o)[:total], np.asarray(lse)[:total])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=12)
@given(data=st.data(), window=st.none() | st.integers(1, 40), seed=st.integers(0, 9999))
def test_ring_equals_attention_of_the_unstriped_prompts(shape, data, window, seed):
    packing = data.draw(packings(shape.tokens))
    qkv = random_qkv(packing, shape, seed)
    found = ring(qkv, packing, shape, window)
    wanted = whole(qkv, packing, shape, window)
    assert_close(found, wanted, rounding_bounds(*qkv, scale=shape.scale))
    wanted = exact.attention(*qkv, packing.visible(window), **shape.options)
    exact.error_of(found, wanted, shape.dtype, kernel="striped_attention", path="XLA")


def test_prompts_of_several_tiles():
    packing = Packing((700, 1, 250), 2, WIDE.tokens)
    qkv = random_qkv(packing, WIDE, 1)
    found, wanted = ring(qkv, packing, WIDE, 300), whole(qkv, packing, WIDE, 300)
    assert_close(found, wanted, rounding_bounds(*qkv, scale=WIDE.scale))


def test_a_key_of_another_prompt_is_never_visible():
    shape = SHAPES[2]
    packing = Packing((33, 21, 30), 2, shape.tokens)
    qkv = random_qkv(packing, shape, 2)
    middle = slice(33, 33 + 21)
    before = ring(qkv, packing, shape, None)
    for other in qkv[1:]:
        other[:33], other[54:] = 1e30, -1e30
    after = ring(qkv, packing, shape, None)
    np.testing.assert_array_equal(before.o[middle], after.o[middle])
    np.testing.assert_array_equal(before.lse[middle], after.lse[middle])


def test_tiles_beyond_what_is_used_keep_their_carry():
    shape = SHAPES[2]
    packing = Packing((shape.tile + 1,), 1, shape.tokens)
    q, k, v = (stripe(x, packing, 0) for x in random_qkv(packing, shape, 3))
    rows, beyond = (shape.heads, shape.tokens), slice(2 * shape.tile, None)
    carry = Carry(jnp.ones(rows), jnp.full(rows, 2.0), jnp.full((*rows, shape.head_dim), 3.0))
    first = packing.first(0, 0, None)
    fold = compiled(shape)
    after = fold(carry, q, k, v, first, shift=np.int32(0), used=np.int32(packing.used))
    for old, new in zip(carry, after, strict=True):
        np.testing.assert_array_equal(new[:, beyond], old[:, beyond])
        assert not np.array_equal(new[:, : packing.used], old[:, : packing.used])


@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
def test_tile_is_the_largest_that_divides_the_stripe(shape):
    assert tile_size(shape.tokens) == shape.tile


def test_tiles_are_never_wider_than_256_tokens():
    assert tile_size(4096) == 256
