"""Penalties, bias and cuts against transformers' processors, on the same logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loongjax.sampling.cut import cut
from loongjax.sampling.params import SamplingParams
from tests.sampling.rows import Row, logprobs, said, shaped

VOCAB = 40
cut_rows = jax.jit(lambda x, k, p, m: cut(x, top_k_R=k, top_p_R=p, min_p_R=m))


def random_logits(seed: int, rows: int = 4) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32)


def processed(logits: np.ndarray, ids: list[int], processors: list) -> np.ndarray:
    scores = torch.tensor(logits[None])
    return LogitsProcessorList(processors)(torch.tensor([ids]), scores)[0].numpy()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 9999),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_cuts_are_those_of_transformers(seed, top_k, top_p, min_p):
    below = random_logits(seed)
    below -= below.max(1, keepdims=True)
    rows = len(below)
    found = cut_rows(
        below,
        np.full(rows, top_k, np.int32),
        np.full(rows, top_p, np.float32),
        np.full(rows, min_p, np.float32),
    )
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    for row, expected in zip(np.asarray(found), below, strict=True):
        np.testing.assert_array_equal(row, processed(expected, [0], warpers))


def test_equally_likely_tokens_are_kept_together():
    below = np.array([[0, -1, -1, -1, -2]], np.float32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    for count in (2, 3, 4):
        found = cut_rows(below, np.full(1, count, np.int32), one, zero)
        np.testing.assert_array_equal(np.isfinite(found), [[True, True, True, True, False]])
    found = cut_rows(below, np.zeros(1, np.int32), np.float32([0.5]), zero)
    np.testing.assert_array_equal(np.isfinite(found), [[True, True, True, True, False]])


@settings(max_examples=25)
@given(
    seed=st.integers(0, 9999),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    answer=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=4),
    min_tokens=st.integers(0, 8),
    data=st.data(),
)
def test_shaping_is_that_of_transformers(seed, prompt, answer, penalty, bias, min_tokens, data):
    (logits,) = random_logits(seed, 1)
    params = SamplingParams(repetition_penalty=penalty, logit_bias=bias, min_tokens=min_tokens)
    late = data.draw(st.integers(0, len(answer)))
    row = Row(
        params=params,
        prompt=tuple(prompt),
        answer=tuple(answer),
        end_ids=frozenset({3, 9}),
        late=late,
    )
    processors = []
    if bias:
        sequences = {(token,): float(value) for token, value in bias.items()}
        processors.append(SequenceBiasLogitsProcessor(sequences))
    processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if min_tokens:
        device = torch.device("cpu")
        processors.append(
            MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, [3, 9], device=device)
        )
    expected = processed(logits, [*prompt, *answer], processors)
    np.testing.assert_allclose(shaped(logits[None], [row])[0], expected, rtol=1e-6)


@pytest.mark.parametrize("late", [0, 1, 4])
def test_presence_and_frequency_count_the_answer_alone(late):
    """As OpenAI defines them: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    (logits,) = random_logits(1, 1)
    answer = (7, 2, 7, 7)
    params = SamplingParams(presence_penalty=0.75, frequency_penalty=-0.5)
    row = Row(params=params, prompt=(1, 2, 30), answer=answer, late=late)
    count = np.bincount(answer, minlength=VOCAB)
    expected = logits + 0.5 * count - 0.75 * (count > 0)
    np.testing.assert_allclose(shaped(logits[None], [row])[0], expected, rtol=1e-6)


def test_logprobs_are_the_models_own_whatever_is_asked_for():
    logits = random_logits(5, 3)
    rows = [
        Row(params=SamplingParams(temperature=0, logprobs=20)),
        Row(params=SamplingParams(temperature=3.0, top_k=5, logprobs=0), seed=4),
        Row(params=SamplingParams(temperature=0, logit_bias={11: 100}, logprobs=2)),
    ]
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    for row, found in enumerate(logprobs(logits, rows, top=20)):
        order = np.argsort(-expected[row], kind="stable")
        assert found.rank == 1 + list(order).index(found.token)
        np.testing.assert_allclose(found.logprob, expected[row, found.token], rtol=1e-5)
        assert [token for token, _ in found.top] == order[:20].tolist()
        np.testing.assert_allclose(
            [value for _, value in found.top], expected[row, order[:20]], rtol=1e-5
        )
    assert logprobs(logits, rows, top=20)[2].token == 11


def test_nobody_pays_for_what_nobody_asks():
    rows = [Row(params=SamplingParams(temperature=0))] * 3
    assert not said(random_logits(2, 3), rows)[:, 1:].any()


def test_a_vocabulary_smaller_than_what_is_told():
    logits = np.zeros((1, 5), np.float32)
    (found,) = logprobs(logits, [Row(params=SamplingParams(temperature=0, logprobs=5))], top=5)
    assert [token for token, _ in found.top] == [0, 1, 2, 3, 4]
