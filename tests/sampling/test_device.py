"""Draws on the device: from the right distribution, and from nothing but their own key."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.sampling.device import sample

VOCAB = 12
draw = jax.jit(sample)


def logits_of(rows: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32)


def tokens_of(logits, temperature, seed, position, number=0) -> np.ndarray:
    """`number` is that of the sample among the answers to its prompt."""
    rows = len(logits)
    parts = [np.broadcast_to(np.int32(part), rows) for part in (seed, number, position)]
    return np.asarray(draw(logits, np.broadcast_to(np.float32(temperature), rows), *parts))


@settings(max_examples=30)
@given(seed=st.integers(0, 9999), key=st.integers(0, 2**31 - 1))
def test_temperature_zero_is_the_most_likely_token(seed, key):
    logits = logits_of(8, seed)
    np.testing.assert_array_equal(tokens_of(logits, 0.0, key, 5), logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e-2, 1e-30, 2e-38, 1e-45])
def test_a_tiny_temperature_is_the_most_likely_token_too(temperature):
    """Logits over such temperatures overflow, all of them when all are negative."""
    logits = np.arange(4 * VOCAB, dtype=np.float32).reshape(4, VOCAB)
    logits[:, 3] += 100
    for shift in (0, -1000):
        found = tokens_of(logits + shift, temperature, np.arange(4), 1)
        np.testing.assert_array_equal(found, [3] * 4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("vary", ["seed", "number", "position"])
def test_draws_follow_the_softmax(temperature, vary):
    """Pearson's chi-square over independent draws.

    Its mean is VOCAB - 1, its variance twice that. By Laurent and Massart it exceeds
    d + 2 sqrt(d x) + 2 x with probability at most exp(-x): one in a million at x = 13.8.
    """
    draws = 20_000
    logits = np.random.default_rng(3).uniform(-1.2, 1.2, (1, VOCAB)).astype(np.float32)
    key = {"seed": 7, "number": 0, "position": 7, vary: np.arange(draws)}
    found = tokens_of(np.repeat(logits, draws, 0), temperature, **key)
    weights = np.exp(logits[0].astype(np.float64) / temperature)
    expected = draws * weights / weights.sum()
    assert expected.min() > 5  # else the statistic is not chi-square
    statistic = ((np.bincount(found, minlength=VOCAB) - expected) ** 2 / expected).sum()
    d, x = VOCAB - 1, np.log(1e6)
    assert statistic < d + 2 * np.sqrt(d * x) + 2 * x


@settings(max_examples=30)
@given(data=st.data(), order=st.permutations(range(8)), rows=st.integers(1, 8))
def test_a_token_depends_on_neither_the_order_of_rows_nor_their_company(data, order, rows):
    logits = logits_of(8, data.draw(st.integers(0, 9999)))
    temperature = np.array(
        data.draw(st.lists(st.sampled_from([0, 0.7, 2]), min_size=8, max_size=8))
    )
    seed = np.array(data.draw(st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=8)))
    position = np.arange(8) * 3
    together = tokens_of(logits, temperature, seed, position)
    chosen = np.array(order[:rows])
    company = np.zeros(8, int)  # other rows become greedy ones of another request
    company[:rows] = chosen
    heat = np.where(np.arange(8) < rows, temperature[company], 0)
    found = tokens_of(logits[company], heat, seed[company], position[company])
    np.testing.assert_array_equal(found[:rows], together[chosen])


def test_a_key_is_seed_sample_and_position():
    """Among equal logits, two keys draw the same token with probability 1 / VOCAB."""
    rows = 600
    flat = np.zeros((rows, VOCAB), np.float32)
    again, count = tokens_of(flat, 1.0, 5, 9), np.arange(rows)
    assert len(set(again)) == 1
    for key in [(count, 9), (5, count), (count, rows - count), (5, 9, count), (count, 9, -count)]:
        found = tokens_of(flat, 1.0, *key)
        np.testing.assert_array_equal(found, tokens_of(flat, 1.0, *key))
        equal = (found[1:] == found[:-1]).mean()
        # Six standard deviations of a mean of independent draws.
        assert abs(equal - 1 / VOCAB) < 6 * np.sqrt(1 / VOCAB / rows)
    np.testing.assert_array_equal(tokens_of(flat[:1], 1.0, 5, 9), again[:1])


def test_padded_vocabulary_is_never_drawn():
    logits = logits_of(2000, 1)
    logits[:, -3:] = -np.inf
    found = tokens_of(logits, 100.0, np.arange(2000), 4)
    assert found.max() == VOCAB - 4
