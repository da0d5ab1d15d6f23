"""Prompts in the forms that `LLM` takes, turned into token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex, TypeAlias, TypeGuard, cast

from loongjax.errors import RequestError
from loongjax.sampling.params import SamplingParams
from loongjax.text import Tokenizer

Prompt: TypeAlias = str | Sequence[SupportsIndex] | Sequence[Mapping[str, str]]
"""A text; token ids, of which numpy's integers are as good as Python's; or a chat: messages with
`role` and `content`, oldest first."""


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt. An empty list is no prompt at all."""
    if isinstance(prompts, str):
        return True
    return len(prompts) > 0 and (is_chat(prompts) or not hasattr(prompts[0], "__len__"))


def is_chat(prompt: object) -> TypeGuard[Sequence[Mapping[str, str]]]:
    """Whether a prompt is a chat."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The token ids of a prompt.

    Raises:
      RequestError: It is none of what `Prompt` says, or text for a model without tokenizer.
    """
    if isinstance(prompt, str):
        return tuple(need_tokenizer(tokenizer).encode(prompt, add_special=True))
    if is_chat(prompt):
        return tuple(need_tokenizer(tokenizer).encode_chat(prompt))
    return as_token_ids(prompt)


def as_token_ids(values: Iterable[object]) -> tuple[int, ...]:
    """The ids as plain ints.

    Raises:
      RequestError: Something among them is not an integer.
    """
    try:
        return tuple(map(operator.index, cast(Iterable[SupportsIndex], values)))
    except TypeError as error:
        raise RequestError(f"a prompt is a text or a list of token ids: {error}") from error


def need_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer; RequestError if the model has none."""
    if tokenizer is None:
        raise RequestError("this model has no tokenizer; give token ids instead of text")
    return tokenizer


def params_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    """One set of parameters for each prompt.

    Raises:
      RequestError: There are as many neither as prompts nor one.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise RequestError(
            f"got {len(params)} sampling params for {prompts} prompts; give one for each, or a "
            "single one for all"
        )
    return list(params)
