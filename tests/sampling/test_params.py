"""Sampling parameters refuse what they cannot mean, naming the value and the limit."""

from __future__ import annotations

import math

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


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=0.5)


def test_params_can_be_shared_and_hashed():
    assert len({SamplingParams(seed=3), SamplingParams(seed=3), SamplingParams(seed=4)}) == 2
    with pytest.raises(AttributeError):
        SamplingParams().seed = 3
