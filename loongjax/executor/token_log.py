"""What an executor knows of each request: its tokens, and how the next one is chosen."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int32

from loongjax.executor.protocol import RequestInput
from loongjax.sampling.table import TokenTable, needs_table, row_fields


class TokenLog:
    """The known tokens of one request: its prompt, then what was generated.

    Attributes:
      fields: Numbers of its row (`loongjax.sampling.fields.FIELDS`).
      table: Its notes on the vocabulary, up to date; None where the choice needs none.
      revision: How often the tokens that may come next were restricted.
      logprobs, prompt_logprobs: How many of the most likely tokens are told of; None: nothing is.
    """

    def __init__(self, request: RequestInput, vocab_size: int) -> None:
        """`vocab_size` is that of the program's logits."""
        self._tokens = np.array(request.token_ids, np.int32)
        self._length = len(self._tokens)
        self._next_id = request.next_id
        params = request.params
        self.fields = row_fields(
            params,
            seed=request.seed,
            sample=request.sample,
            prompt=self._length,
            is_noted=request.is_masked or needs_table(params),
        )
        self.revision = 0
        self.logprobs, self.prompt_logprobs = params.logprobs, params.prompt_logprobs
        self._prompt = self._length
        self.table: TokenTable | None = None
        if self.fields["is_noted"]:
            self.table = TokenTable(params, self._tokens, request.end_ids, vocab_size)

    def append(self, token: int) -> None:
        """Adds a generated token; amortised O(1)."""
        if self._length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
        self._tokens[self._length] = token
        self._length += 1
        if self.table is not None:
            self.table.add(token)

    def restrict(self, allowed: Bool[np.ndarray, " V"]) -> None:
        """Says which tokens may come next."""
        assert self.table is not None
        self.table.allow(allowed)
        self.revision += 1

    def to_score(self, start: int, end: int) -> Int32[np.ndarray, " T"]:
        """Tokens `start`, `start + 1`, … before `end` of which log-probabilities are to be told:
        those of the prompt, with the one behind it where it is known.
        """
        if self.prompt_logprobs is None:
            return self._tokens[:0]
        tokens = self._tokens[start : min(end, self._prompt)]
        if self._next_id is not None and start <= self._prompt < end:
            tokens = np.append(tokens, np.int32(self._next_id))
        return tokens

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> int:
        return int(self._tokens[: self._length][position])

    def every(self, step: int, start: int, end: int) -> Int32[np.ndarray, " T"]:
        """Tokens `start`, `start + step`, … before `end`."""
        return self._tokens[start : min(end, self._length) : step]
