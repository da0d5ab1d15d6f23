"""Requests that cannot be served are refused in words that help."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from loongjax.engine import Admission, GenerationRequest
from loongjax.errors import CapacityError, RequestError
from loongjax.sampling.params import SamplingParams

LIMITS = Admission(
    vocab_size=100,
    max_model_len=60,
    block_size=4,
    instance_slots=18,  # four whole blocks
    degree=3,
)


def check(prompt: list[int], max_tokens: int | None = 1, limits: Admission = LIMITS) -> int:
    params = SamplingParams(max_tokens=max_tokens)
    return limits.check(GenerationRequest(id="a", token_ids=tuple(prompt), params=params))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt is empty"),
        (
            [1, 100],
            1,
            "token id 100 at position 1 of the prompt is outside the vocabulary [0, 100)",
        ),
        ([1, 2, -1], 1, "token id -1 at position 2"),
        ([1] * 60, 1, "the prompt has 60 tokens; with max_model_len 60 at most 59"),
        ([1] * 45, 16, "prompt 45 + max_tokens 16 = 61 tokens exceed max_model_len 60"),
    ],
)
def test_refusals_name_the_numbers(prompt: list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        check(prompt, max_tokens)


def test_pool_is_counted_in_whole_blocks() -> None:
    # 48 slots in whole blocks: a peak of 48 fits, one of 49 takes 52.
    assert check([1] * 40, 9) == 9
    with pytest.raises(
        CapacityError,
        match=re.escape(
            "prompt 40 + max_tokens 10 need 52 KV slots (49 tokens in blocks of 4); the largest "
            "group (3 instances of 18 slots) has 48"
        ),
    ):
        check([1] * 40, 10)


def test_longest_prompts_are_taken() -> None:
    assert check([1] * 48) == 1  # all that the pool holds
    assert check([0, 99]) == 1


def test_no_max_tokens_means_up_to_the_end_of_the_context() -> None:
    assert check([1] * 20, None, Admission(**_fields() | {"instance_slots": 40})) == 40


def _fields() -> dict[str, int]:
    return {name: getattr(LIMITS, name) for name in LIMITS.__slots__}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop="x"), "stop has texts, but this model has no tokenizer"),
        (SamplingParams(stop_token_ids=(100,)), "stop_token_ids has token 100, outside"),
        (SamplingParams(logit_bias={100: 1.0}), "logit_bias has token 100, outside"),
    ],
)
def test_params_must_fit_the_model(params: SamplingParams, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        LIMITS.check(GenerationRequest(id="a", token_ids=(1,), params=params))
    inside = SamplingParams(max_tokens=1, stop="x", stop_token_ids=(99,), logit_bias={99: 1.0})
    request = GenerationRequest(id="a", token_ids=(1,), params=inside)
    assert replace(LIMITS, has_text=True).check(request)
