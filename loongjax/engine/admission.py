"""Which requests can be served at all: checked in the caller's thread, before they queue.

Pure: no state but the limits. What passes here fits the pool when it is alone there; a prompt
may be longer than a step takes, for it is computed in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loongjax.engine.messages import GenerationRequest
from loongjax.errors import CapacityError, RequestError
from loongjax.sampling.params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """The limits of an engine.

    Attributes:
      vocab_size: Token ids are in [0, vocab_size).
      max_model_len: Tokens of prompt and answer together.
      block_size: Tokens per block of the pool.
      instance_slots: KV tokens that one instance holds.
      degree: Instances of the largest group. A request's KV must lie within one group.
      has_text: Whether a text may end an answer.
    """

    vocab_size: int
    max_model_len: int
    block_size: int
    instance_slots: int
    degree: int
    has_text: bool = False

    @property
    def capacity(self) -> int:
        """KV tokens that the largest group holds, whole blocks alone counted."""
        return self.degree * self._round_down(self.instance_slots)

    def check(self, request: GenerationRequest) -> int:
        """How many tokens the request may generate at most, `max_tokens=None` resolved.

        Raises:
          RequestError: An empty prompt, an id outside the vocabulary, a length limit, or stop texts
            for a model without text.
          CapacityError: It would need more KV slots than the largest group has.
        """
        prompt = len(request.token_ids)
        self._check_ids(request.token_ids)
        self._check_params(request.params)
        if prompt > self.max_model_len - 1:
            raise RequestError(
                f"the prompt has {prompt} tokens; with max_model_len {self.max_model_len} at "
                f"most {self.max_model_len - 1} leave room for an answer. Shorten the prompt, "
                "or raise max_model_len"
            )
        room = self.max_model_len - prompt
        max_tokens = room if request.params.max_tokens is None else request.params.max_tokens
        if max_tokens > room:
            raise RequestError(
                f"prompt {prompt} + max_tokens {max_tokens} = {prompt + max_tokens} tokens exceed "
                f"max_model_len {self.max_model_len}; max_tokens may be at most {room}"
            )
        self._check_capacity(prompt, max_tokens)
        return max_tokens

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"token id {token} at position {token_ids.index(token)} of the prompt is "
                    f"outside the vocabulary [0, {self.vocab_size}); was the prompt encoded for "
                    "another model?"
                )

    def _check_params(self, params: SamplingParams) -> None:
        if params.stop and not self.has_text:
            raise RequestError(
                "stop has texts, but this model has no tokenizer; use stop_token_ids"
            )
        biased = [token for token, _ in params.biases]
        for field, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
            for token in tokens:
                if token >= self.vocab_size:
                    raise RequestError(
                        f"{field} has token {token}, outside the vocabulary [0, {self.vocab_size})"
                    )

    def _check_capacity(self, prompt: int, max_tokens: int) -> None:
        peak = prompt + max_tokens - 1
        needed = -(-peak // self.block_size) * self.block_size
        if needed > self.capacity:
            raise CapacityError(
                f"prompt {prompt} + max_tokens {max_tokens} need {needed} KV slots ({peak} tokens "
                f"in blocks of {self.block_size}); the largest group ({self.degree} instances of "
                f"{self.instance_slots} slots) has {self.capacity}. Lower max_tokens, or give the "
                "pool more slots or instances"
            )

    def _round_down(self, slots: int) -> int:
        return slots // self.block_size * self.block_size
