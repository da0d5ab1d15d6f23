"""Sampling parameters refuse what they cannot mean, naming the value and the limit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from loongjax.errors import RequestError
from loongjax.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, r"temperature must be in \[0, 100\], not -0\.1"),
        ("temperature", 100.5, r"temperature must be in \[0, 100\], not 100\.5"),
        ("temperature", math.nan, r"temperature must be in \[0, 100\], not nan"),
        ("temperature", math.inf, r"temperature must be in \[0, 100\], not inf"),
        ("seed", -1, r"seed must be in \[0, 2147483648\), not -1"),
        ("seed", 2**31, r"seed must be in \[0, 2147483648\), not 2147483648"),
        ("max_tokens", 0, "max_tokens must be at least 1, not 0"),
        ("max_tokens", -5, "max_tokens must be at least 1, not -5"),
        ("stop_token_ids", (3, -2), "stop_token_ids must not be negative, got -2"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\], not 0"),
        ("top_p", 1.1, r"top_p must be in \(0, 1\], not 1\.1"),
        ("top_p", math.nan, "top_p must be in"),
        ("top_k", -2, "top_k must be -1, 0 or a number of tokens, not -2"),
        ("min_p", -0.1, r"min_p must be in \[0, 1\], not -0\.1"),
        ("repetition_penalty", 0.0, r"repetition_penalty must be in \[0\.01, 100\], not 0"),
        ("presence_penalty", 2.1, r"presence_penalty must be in \[-2, 2\], not 2\.1"),
        ("frequency_penalty", -2.1, r"frequency_penalty must be in \[-2, 2\], not -2\.1"),
        ("min_tokens", -1, "min_tokens must be in .* not -1"),
        ("logprobs", 21, r"logprobs must be in \[0, 20\], not 21"),
        ("prompt_logprobs", -1, r"prompt_logprobs must be in \[0, 20\], not -1"),
        ("stop", [""], "a text of stop has 1 to 1000 characters, not 0"),
        ("stop", ["a"] * 65, "stop may have 64 texts, not 65"),
        ("logit_bias", {-1: 0.5}, "logit_bias must not have negative tokens, got -1"),
        ("logit_bias", {4: 100.5}, r"logit_bias must be in \[-100, 100\], not 100\.5 for token 4"),
        ("logit_bias", dict.fromkeys(range(1025), 1.0), "logit_bias may have 1024 tokens"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("seed", 0),
        ("seed", 2**31 - 1),
        ("seed", None),
        ("max_tokens", 1),
        ("max_tokens", None),
        ("stop_token_ids", (0, 7)),
        ("ignore_eos", True),
    ],
)
def test_the_limits_themselves_are_taken(field, value):
    assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.usefixtures("without_shape_checks")  # they would refuse it first
def test_a_broken_number_is_refused_by_name():
    with pytest.raises(RequestError, match=r"top_k must be a whole number, not 0\.5"):
        SamplingParams(**{"top_k": 0.5})


def test_fields_take_what_vllms_take():
    params = SamplingParams(stop="end", top_k=-1, logit_bias={3: 1.0, 5: -2}, stop_token_ids=[4])
    assert (params.stop, params.top_k, params.stop_token_ids) == (("end",), 0, (4,))
    assert params.biases == ((3, 1.0), (5, -2))
    assert replace(params, n=2).biases == params.biases
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_min_tokens_go_up_to_max_tokens():
    assert SamplingParams(min_tokens=3, max_tokens=3).min_tokens == 3
    with pytest.raises(RequestError, match=r"in \[0, max_tokens = 3\], not 4"):
        SamplingParams(min_tokens=4, max_tokens=3)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=0.5)


def test_params_can_be_shared_and_hashed():
    assert len({SamplingParams(seed=3), SamplingParams(seed=3), SamplingParams(seed=4)}) == 2
    with pytest.raises(AttributeError):
        SamplingParams().seed = 3
