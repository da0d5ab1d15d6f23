"""Partial results merge to the whole, however the keys were shared out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import reference
from pallas_kernels.partials import (
    Carry,
    Partial,
    empty_carry,
    finish,
    fold_partial,
    fold_weights,
    merge,
    put_carry,
    slice_carry,
)
from tests.pallas_kernels.cases import Bounds, assert_close, draw, rounding_bounds

KEYS, QUERIES, HEADS, HEAD_DIM, SHARES = 24, 5, 4, 8, 5
SCALE = HEAD_DIM**-0.5

owners = st.lists(st.integers(0, SHARES - 1), min_size=KEYS, max_size=KEYS)
seeds = st.integers(0, 9999)


@jax.jit
def attend(q, k, v, visible) -> Partial:
    return reference.attention(q, k, v, visible, scale=SCALE)


attend_shares = jax.jit(jax.vmap(attend, in_axes=(None, None, None, 0)))
merge_shares = jax.jit(merge)


@jax.jit
def fold_partials(shares: Partial) -> Partial:
    """Folds finished partials into a running softmax, one after another."""
    carry = empty_carry((QUERIES, HEADS), HEAD_DIM)
    for o, lse in zip(*shares, strict=True):
        carry = fold_partial(carry, Partial(o, lse))
    return finish(carry)


@jax.jit
def fold_shares(s_SxTxK, v_KxD) -> Partial:
    """A running softmax over the same keys again and again, each time with others masked."""
    carry = empty_carry((QUERIES,), HEAD_DIM)
    for s in s_SxTxK:
        m, p, shrink = fold_weights(carry.m, s)
        o = carry.o * shrink[:, None] + jnp.dot(p, v_KxD, precision="highest")
        carry = carry._replace(m=m, l=carry.l * shrink + p.sum(-1), o=o)
    return finish(carry)


def inputs(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [(QUERIES, HEADS, HEAD_DIM), (KEYS, 2, HEAD_DIM), (KEYS, 2, HEAD_DIM)]
    return [draw(rng, shape, jnp.float32) for shape in shapes]


def shared_out(seed: int, owner: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which keys queries see: all together, and of each share. Query 0 sees none."""
    visible = np.random.default_rng(seed).random((QUERIES, KEYS)) < 0.5
    visible[0] = False
    return visible, visible & (np.array(owner) == np.arange(SHARES)[:, None])[:, None]


def assert_same(a: Partial, b: Partial) -> None:
    np.testing.assert_array_equal(a.o, b.o)
    np.testing.assert_array_equal(a.lse, b.lse)


@settings(max_examples=50)
@given(owner=owners, seed=seeds)
def test_answer_does_not_depend_on_who_has_which_keys(owner, seed):
    q, k, v = inputs(seed)
    visible, visible_of_shares = shared_out(seed, owner)
    found = merge_shares(*attend_shares(q, k, v, visible_of_shares))
    whole = attend(q, k, v, visible)
    assert_close(found, whole, rounding_bounds(q, k, v, scale=SCALE))
    assert np.isneginf(np.asarray(found.lse)[0]).all()


@settings(max_examples=50)
@given(owner=owners, seed=seeds)
def test_a_running_softmax_over_shares_equals_the_whole(owner, seed):
    _, _, v = inputs(seed)
    visible, visible_of_shares = shared_out(seed, owner)
    s = np.random.default_rng(seed).standard_normal((QUERIES, KEYS)).astype(np.float32) * 5
    found = fold_shares(np.where(visible_of_shares, s, -np.inf).astype(np.float32), v[:, 0])
    weights = np.where(visible, np.exp(s.astype(np.float64)), 0.0)
    total = weights.sum(-1)
    o = weights @ v[:, 0].astype(np.float64) / np.where(total > 0, total, 1)[:, None]
    with np.errstate(divide="ignore"):
        whole = Partial(o, np.log(total))
    # Every fold rounds a weight's exponent, scale and sum; sums have KEYS terms.
    error = float(SHARES * (2 * np.abs(s).max() + KEYS) * np.finfo(np.float32).eps)
    assert_close(found, whole, Bounds(o=2 * error * float(np.abs(v).max()), lse=error))


@settings(max_examples=50)
@given(owner=owners, seed=seeds)
def test_folding_partials_one_by_one_equals_merging_them(owner, seed):
    q, k, v = inputs(seed)
    _, visible_of_shares = shared_out(seed, owner)
    shares = attend_shares(q, k, v, visible_of_shares)
    bounds = rounding_bounds(q, k, v, scale=SCALE)
    assert_close(fold_partials(shares), merge_shares(*shares), bounds)


@pytest.mark.parametrize("at", [0, 4, 7])
def test_a_slice_of_a_carry_goes_back_to_its_place(at):
    rows = jnp.arange(2.0)[:, None] * 100 + jnp.arange(10.0)
    carry = Carry(rows, rows + 1000, jnp.stack([rows] * 3, axis=-1))
    part = slice_carry(carry, jnp.int32(at), 3)
    for whole, cut in zip(carry, part, strict=True):
        np.testing.assert_array_equal(cut, whole[:, at : at + 3])
    changed = Carry(*(-leaf for leaf in part))
    for old, new in zip(carry, put_carry(carry, changed, jnp.int32(at)), strict=True):
        np.testing.assert_array_equal(new, old.at[:, at : at + 3].multiply(-1))


@settings(max_examples=20)
@given(at=st.integers(0, SHARES - 1), seed=seeds)
def test_empty_shares_merge_to_exactly_nothing(at, seed):
    q, k, v = inputs(seed)
    shares = attend_shares(q, k, v, shared_out(seed, [at] * KEYS)[1])
    alone = Partial(shares.o[at : at + 1], shares.lse[at : at + 1])
    assert_same(merge_shares(*shares), merge_shares(*alone))


def test_only_empty_shares_merge_to_an_empty_one():
    found = merge(jnp.zeros((3, 2, HEAD_DIM)), jnp.full((3, 2), -jnp.inf))
    assert_same(found, Partial(jnp.zeros((2, HEAD_DIM)), jnp.full(2, -jnp.inf)))


@pytest.mark.parametrize("lse", [-1e4, 1e4])
def test_large_scores_neither_overflow_nor_vanish(lse):
    found = merge(jnp.array([[1.0], [3.0]]), jnp.array([lse, lse]))
    np.testing.assert_allclose(found.o, [2.0], rtol=1e-6)
    np.testing.assert_allclose(found.lse, lse + np.log(2), rtol=1e-6)


def test_a_share_far_below_the_other_counts_nothing():
    found = merge(jnp.array([[1.0], [3.0]]), jnp.array([1e4, -1e4]))
    assert_same(found, Partial(jnp.array([1.0]), jnp.array(1e4)))


def test_masked_scores_leave_a_running_softmax_as_it_was():
    m = jnp.array([0.5, -jnp.inf])
    found, weights, shrink = fold_weights(m, jnp.full((2, 3), -jnp.inf))
    np.testing.assert_array_equal(found, m)
    np.testing.assert_array_equal(weights, np.zeros((2, 3)))
    assert shrink[0] == 1.0
    assert np.isfinite(shrink[1])


def test_a_carry_that_saw_nothing_finishes_as_an_empty_partial():
    found = finish(empty_carry((2, 3), HEAD_DIM))
    assert_same(found, Partial(jnp.zeros((2, 3, HEAD_DIM)), jnp.full((2, 3), -jnp.inf)))
