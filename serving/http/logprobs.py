"""Log-probabilities in JSON, as OpenAI's API has them, and those of prompts as vLLM's has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loongjax.plan import TokenLogprobs
from loongjax.text import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobWriter:
    """Writes them down; without a tokenizer a token's text is `token_id:N`, as vLLM has it."""

    tokenizer: Tokenizer | None

    def of_chat(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """A choice of a chat."""
        return {
            "content": [
                self._entry(each.token, each.logprob)
                | {"top_logprobs": [self._entry(token, value) for token, value in each.top]}
                for each in logprobs
            ]
        }

    def of_completion(self, logprobs: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """A choice of a completion; `offset` is the length of the tokens' texts before."""
        texts = [self.text(each.token) for each in logprobs]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [self._by_text(each) for each in logprobs],
            "text_offset": offsets,
        }

    def of_prompt(self, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
        """A prompt: of each token but the first, by id."""
        return [None, *map(self._by_id, logprobs)]

    def text(self, token: int) -> str:
        """A token as a text of its own."""
        if self.tokenizer is None:
            return f"token_id:{token}"
        return self.tokenizer.decode((token,), skip_special=False)

    def _by_text(self, logprobs: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the token itself, however unlikely; of those with one text, as
        halves of a character have it, the likeliest.
        """
        found: dict[str, float] = {}
        for token, value in (*logprobs.top, (logprobs.token, logprobs.logprob)):
            text = self.text(token)
            found[text] = max(value, found.get(text, value))
        return found

    def _by_id(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        ranked = [(token, value, i) for i, (token, value) in enumerate(logprobs.top, 1)]
        own = logprobs.token, logprobs.logprob, logprobs.rank
        return {
            str(token): {"logprob": value, "rank": rank, "decoded_token": self.text(token)}
            for token, value, rank in (*ranked, own)
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = b"" if self.tokenizer is None else b"".join(self.tokenizer.pieces((token,), False))
        return {"token": self.text(token), "logprob": logprob, "bytes": list(data)}
