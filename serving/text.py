"""Prompts to tokens and answers to text, for an asyncio loop that must not wait.

Owns the choice of what is quick enough for the loop's own thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loongjax.api.prompts import as_token_ids, encode_prompt, need_tokenizer
from loongjax.sampling.params import SamplingParams
from loongjax.text import AnswerText, Tokenizer
from serving.stream import Progress

_QUICK_CHARACTERS = 2_000
"""A text of this length is encoded in less time than a change of threads costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation, written as the model's template says; see `Tokenizer.encode_chat`."""

    messages: Sequence[Mapping[str, Any]]


Prompt: TypeAlias = str | Sequence[int] | Chat


async def encode(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The token ids of a prompt.

    Raises:
      RequestError: It cannot be encoded, or the model has no tokenizer, or no chat template.
    """
    if isinstance(prompt, Chat):
        chat = await asyncio.to_thread(need_tokenizer(tokenizer).encode_chat, prompt.messages)
        return tuple(chat)
    if isinstance(prompt, str) and len(prompt) > _QUICK_CHARACTERS:
        return await asyncio.to_thread(encode_prompt, prompt, tokenizer)
    return encode_prompt(prompt, tokenizer) if isinstance(prompt, str) else as_token_ids(prompt)


class AnswerTexts:
    """The texts of one request's answers, as they become final."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        """Without a tokenizer all texts are empty."""
        self._texts = [AnswerText(tokenizer, params) for _ in range(params.n)]

    def push(self, piece: Progress) -> str:
        """What is final now of the answer that the piece belongs to."""
        text = self._texts[piece.sample]
        said = text.push(piece.token_ids, stopped=piece.stopped)
        return said if piece.end is None else said + text.flush()
