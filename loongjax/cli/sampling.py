"""Flags of `loongjax generate` that say how answers are drawn: one for each field of
`loongjax.SamplingParams` that fits in a flag.
"""

from __future__ import annotations

import argparse
from typing import Any

from loongjax.sampling.params import SamplingParams

_NUMBERS: tuple[tuple[str, type, str, str], ...] = (
    ("max_tokens", int, "N", "tokens to generate at most"),
    ("min_tokens", int, "N", "tokens before the answer may end"),
    ("temperature", float, "T", "0 takes the most likely token (default 0)"),
    ("top_k", int, "N", "draw from so many of the most likely tokens"),
    ("top_p", float, "P", "draw from the most likely tokens that together are as likely as this"),
    ("min_p", float, "P", "draw from tokens at least so likely, relative to the most likely one"),
    ("repetition_penalty", float, "X", "divide the logits of tokens that were there before"),
    ("presence_penalty", float, "X", "take this from the logits of tokens that the answer has"),
    ("frequency_penalty", float, "X", "take this as often as the answer has the token"),
    ("seed", int, "N", "of the random draw (default: a new one)"),
    ("n", int, "N", "answers to each prompt, which share its KV (default 1)"),
    ("logprobs", int, "K", "with --json: log-probabilities of the tokens and of the K best"),
)
_TEMPERATURE = 0.0
"""A command line is tried out: without flags, the same prompt has the same answer."""


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    group = parser.add_argument_group("sampling")
    for field, kind, metavar, text in _NUMBERS:
        group.add_argument(f"--{field.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be given several times",
    )
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="go on after the model's end tokens"
    )


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """What the flags say.

    Raises:
      RequestError: A value is out of range.
    """
    fields = (*(field for field, *_ in _NUMBERS), "stop", "ignore_eos")
    given: dict[str, Any] = {
        field: value for field in fields if (value := getattr(options, field)) is not None
    }
    return SamplingParams(**{"temperature": _TEMPERATURE, **given})


def without_flags() -> SamplingParams:
    """What `sampling_params` gives if there is no flag."""
    return SamplingParams(temperature=_TEMPERATURE)
