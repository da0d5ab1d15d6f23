"""The host's side of a request's sampling: the numbers and the table that its programs read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Bool, Int32

from loongjax.sampling.fields import COUNT, END, FIELDS, PROMPT, float_bits
from loongjax.sampling.params import SamplingParams


class TokenTable:
    """A request's notes on the vocabulary: see `loongjax.sampling.fields`.

    Attributes:
      array: int32 [2, V]; changes as tokens are added.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Int32[np.ndarray, " T"],
        end_ids: Iterable[int],
        vocab_size: int,
    ) -> None:
        """`end_ids` would end the answer; `vocab_size` is that of the program's logits."""
        self.array = np.zeros((2, vocab_size), np.int32)
        self._note, bias = self.array[0], self.array[1].view(np.float32)
        self._note[prompt] |= PROMPT
        self._note[[token for token in end_ids if token < vocab_size]] |= END
        for token, value in params.biases:
            bias[token] += value
        self._bias = bias.copy()

    def allow(self, allowed: Bool[np.ndarray, " V"]) -> None:
        """Forbids all tokens but some, until the next call."""
        bias = self.array[1].view(np.float32)
        bias[:] = self._bias
        bias[: len(allowed)][~allowed] = -np.inf

    def add(self, token: int) -> None:
        """Notes that a token was generated."""
        if self._note[token] & COUNT < COUNT:
            self._note[token] += 1


def needs_table(params: SamplingParams) -> bool:
    """Whether the choice depends on the tokens so far, or on single tokens of the vocabulary."""
    return bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.min_tokens
    )


def row_fields(
    params: SamplingParams, *, seed: int, sample: int, prompt: int, is_noted: bool
) -> Mapping[str, int]:
    """A request's `FIELDS` as its steps' inputs have them; `prompt` is that one's length."""
    fields = {
        "temperature": float_bits(params.temperature),
        "top_p": float_bits(params.top_p),
        "min_p": float_bits(params.min_p),
        "repetition": float_bits(params.repetition_penalty),
        "presence": float_bits(params.presence_penalty),
        "frequency": float_bits(params.frequency_penalty),
        "seed": seed,
        "sample": sample,
        "top_k": params.top_k,
        "first_end": prompt + params.min_tokens,
        "is_noted": int(is_noted),
        "is_cut": int(
            params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        ),
        "is_scored": int(params.logprobs is not None),
    }
    return {name: fields[name] for name in FIELDS}
