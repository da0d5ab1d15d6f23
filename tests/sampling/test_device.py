"""Draws on the device: from the right distribution, and from nothing but their own key."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.sampling.params import SamplingParams
from tests.sampling.rows import Row, drawn, tokens

VOCAB = 12
DRAWS = 5_000


def logits_of(rows: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32)


def params(temperature=1.0, **others) -> SamplingParams:
    return SamplingParams(temperature=temperature, **others)


def plain(logits, temperature, seed=0, position=1, sample=0) -> np.ndarray:
    """Tokens of rows that have a temperature and no more; `sample` tells answers apart."""
    key = {"seed": seed, "position": position, "sample": sample}
    return drawn(logits, Row(params=params(1.0)), temperature=temperature, **key)


def assert_distributed(found: np.ndarray, probability: np.ndarray) -> None:
    """Pearson's chi-square over independent draws; what cannot be drawn never is.

    Its mean is the number of possible tokens less one, d, its variance twice that. By Laurent and
    Massart it exceeds d + 2 sqrt(d x) + 2 x with probability at most exp(-x): one in a million at
    x = 13.8.
    """
    count = np.bincount(found, minlength=VOCAB)
    possible = probability > 0
    assert count[~possible].sum() == 0
    expected = len(found) * probability[possible]
    assert expected.min() > 5  # else the statistic is not chi-square
    statistic = ((count[possible] - expected) ** 2 / expected).sum()
    d, x = possible.sum() - 1, math.log(1e6)
    assert statistic < d + 2 * math.sqrt(d * x) + 2 * x


@settings(max_examples=30)
@given(seed=st.integers(0, 9999), key=st.integers(0, 2**31 - 1))
def test_temperature_zero_is_the_most_likely_token(seed, key):
    logits = logits_of(8, seed)
    np.testing.assert_array_equal(plain(logits, 0.0, key, 5), logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e-2, 1e-30, 2e-38, 1e-45])
def test_a_tiny_temperature_is_the_most_likely_token_too(temperature):
    """Logits over such temperatures overflow, all of them when all are negative."""
    logits = np.arange(4 * VOCAB, dtype=np.float32).reshape(4, VOCAB)
    logits[:, 3] += 100
    for shift in (0, -1000):
        found = plain(logits + shift, temperature, np.arange(4), 1)
        np.testing.assert_array_equal(found, [3] * 4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("vary", ["seed", "sample", "position"])
def test_draws_follow_the_softmax(temperature, vary):
    logits = np.random.default_rng(3).uniform(-1.2, 1.2, (1, VOCAB)).astype(np.float32)
    key = {"seed": 7, "sample": 0, "position": 7, vary: np.arange(DRAWS)}
    found = plain(np.repeat(logits, DRAWS, 0), temperature, **key)
    weights = np.exp(logits[0].astype(np.float64) / temperature)
    assert_distributed(found, weights / weights.sum())


@settings(max_examples=30)
@given(data=st.data(), order=st.permutations(range(8)), rows=st.integers(1, 8))
def test_a_token_depends_on_neither_the_order_of_rows_nor_their_company(data, order, rows):
    """Whatever the company asks for: it decides which branches the program takes."""
    logits = logits_of(8, data.draw(st.integers(0, 9999)))
    asks = st.sampled_from(
        [
            params(0),
            params(0.7),
            params(2, top_k=3),
            params(1, top_p=0.8),
            params(1, min_p=0.2, logprobs=3),
            params(0.5, repetition_penalty=1.5, frequency_penalty=0.3),
            params(0, presence_penalty=1.0, logit_bias={2: 3.0}),
            params(1, min_tokens=5, top_p=0.9, top_k=6),
        ]
    )
    everyone = [
        Row(
            params=data.draw(asks),
            seed=data.draw(st.integers(0, 2**31 - 1)),
            prompt=(1, 4),
            answer=tuple(range(place)),
            end_ids=frozenset({7}),
            late=data.draw(st.integers(0, place)),
        )
        for place in range(8)
    ]
    together = tokens(logits, everyone)
    chosen = list(order[:rows])
    others = [Row(params=params(0))] * (8 - rows)
    found = tokens(logits[[*chosen, *[0] * (8 - rows)]], [everyone[i] for i in chosen] + others)
    np.testing.assert_array_equal(found[:rows], together[chosen])


def test_a_key_is_seed_sample_and_position():
    """Among equal logits, two keys draw the same token with probability 1 / VOCAB."""
    rows = 600
    flat = np.zeros((rows, VOCAB), np.float32)
    again, count = plain(flat, 1.0, 5, 9), np.arange(rows)
    assert len(set(again)) == 1
    for key in [(count, 9), (5, count), (count, rows - count), (5, 9, count), (count, 9, -count)]:
        found = plain(flat, 1.0, *key)
        np.testing.assert_array_equal(found, plain(flat, 1.0, *key))
        equal = (found[1:] == found[:-1]).mean()
        # Six standard deviations of a mean of independent draws.
        assert abs(equal - 1 / VOCAB) < 6 * np.sqrt(1 / VOCAB / rows)
    np.testing.assert_array_equal(plain(flat[:1], 1.0, 5, 9), again[:1])


def test_padded_vocabulary_is_never_drawn():
    logits = logits_of(2000, 1)
    logits[:, -3:] = -np.inf
    found = plain(logits, 100.0, np.arange(2000), 4)
    assert found.max() == VOCAB - 4


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.4},
        {"top_k": 5, "top_p": 0.7, "min_p": 0.1, "temperature": 2.0},
        {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"logit_bias": {1: 1.5, 5: -100}, "min_tokens": 9, "top_p": 0.95},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_draws_follow_the_distribution_that_was_asked_for(asked):
    """Held against a definition in float64 that sorts."""
    logits = np.random.default_rng(8).uniform(-1.5, 1.5, VOCAB).astype(np.float32)
    row = Row(
        params=params(**asked), prompt=(1, 2, 3), answer=(2, 5, 5), end_ids=frozenset({0}), late=1
    )
    found = drawn(np.repeat(logits[None], DRAWS, 0), row, seed=np.arange(DRAWS))
    assert_distributed(found, distribution(logits.astype(np.float64), row))


def distribution(x: np.ndarray, row: Row) -> np.ndarray:
    """The probabilities that a row's parameters describe, written down one by one."""
    asked = row.params
    for token, bias in asked.logit_bias:
        x[token] += bias
    for token in {*row.prompt, *row.answer}:
        x[token] *= 1 / asked.repetition_penalty if x[token] > 0 else asked.repetition_penalty
    for token in set(row.answer):
        x[token] -= asked.presence_penalty
        x[token] -= asked.frequency_penalty * row.answer.count(token)
    if len(row.answer) < asked.min_tokens:
        x[list(row.end_ids)] = -np.inf
    p = np.exp(x / asked.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if asked.top_k:
        p[order[asked.top_k :]] = 0
        p /= p.sum()
    if asked.top_p < 1:
        enough = np.searchsorted(np.cumsum(p[order]), asked.top_p) + 1
        p[order[enough:]] = 0
    p[p < asked.min_p * p.max()] = 0
    return p / p.sum()
