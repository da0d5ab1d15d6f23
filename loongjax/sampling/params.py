"""How a request's next token is chosen: the user's side. Imports no jax."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

from loongjax.errors import RequestError
from loongjax.sampling.fields import MAX_LOGPROBS

_SEED_LIMIT = 2**31
_MOST_SAMPLES = 128
_MOST_STOPS = 64
_LONGEST_STOP = 1_000
_MOST_BIASES = 1_024
_RANGES = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_WHOLE = ("top_k", "n", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling of one request.

    The choice is Gumbel-max, keyed by (seed, sample, position): the same request gives the same
    tokens whatever the degree, the group, or the company it runs in. Fields work in this order:
    logit_bias; repetition, frequency and presence penalty; min_tokens; temperature; top_k, top_p
    and min_p. Tokens of the same likelihood are kept or left out together.

    Attributes:
      temperature: 0 takes the most likely token; above, logits are divided by it.
      top_k: Draw from so many of the most likely tokens; 0 or -1: from all.
      top_p: Of those, draw from the fewest whose probability together is at least this, in (0, 1].
      min_p: Of those, draw from tokens at least so likely, relative to the most likely: [0, 1].
      repetition_penalty: Logits of tokens in the prompt or the answer are divided by it if positive
        and multiplied if not, in [0.01, 100].
      presence_penalty: Subtracted from the logit of each token that the answer has, in [-2, 2].
      frequency_penalty: Subtracted as often as the answer has the token, in [-2, 2].
      logit_bias: Added to the logits of these tokens, in [-100, 100]; at most 1,024 of them. A
        mapping, kept as pairs.
      n: Answers to each prompt, in [1, 128]. The prompt is computed once and its KV shared;
        answer i is the same whatever n is. At temperature 0 they are all alike.
      seed: Of the random draw, in [0, 2**31). None: drawn anew for each request.
      max_tokens: Tokens to generate at most; at least 1. None: up to the context's end.
      min_tokens: Tokens to generate before the answer may end by a token or a text.
      stop: Texts that end the answer, also across tokens: the first that is complete, of several
        at the same place the longest. A text alone is as good as a list of one.
      stop_token_ids: Further tokens that end the answer, beside the model's own. The
        token that ended it is among the output's ids, but not in its text.
      include_stop_str_in_output: Leave what ended the answer in its text.
      ignore_eos: Go on after the model's end tokens (`stop_token_ids` still end it).
      logprobs: Tell the log-probability and the rank of each token of the answer, and so many of
        the most likely tokens at its place, in [0, 20]. They are the model's own: of the logits
        before anything here changes them. None: tell nothing.
      prompt_logprobs: The same of each token of the prompt but the first, in [0, 20].
    """

    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    logit_bias: Mapping[int, float | int] | tuple[tuple[int, float | int], ...] = ()
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            self._check_whole(name)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # refuses NaN too
                raise RequestError(f"{name} must be in [{low:g}, {high:g}], not {value}")
            object.__setattr__(self, name, float(value))
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be in (0, 1], not {self.top_p}")
        object.__setattr__(self, "top_p", float(self.top_p))
        if not -1 <= self.top_k < _SEED_LIMIT:
            raise RequestError(f"top_k must be -1, 0 or a number of tokens, not {self.top_k}")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if not 1 <= self.n <= _MOST_SAMPLES:
            raise RequestError(f"n must be in [1, {_MOST_SAMPLES}], not {self.n}")
        if self.seed is not None and not 0 <= self.seed < _SEED_LIMIT:
            raise RequestError(f"seed must be in [0, {_SEED_LIMIT}), not {self.seed}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise RequestError(f"{name} must be in [0, {MAX_LOGPROBS}], not {count}")
        self._check_ends()
        self._check_bias()

    @property
    def biases(self) -> tuple[tuple[int, float | int], ...]:
        """`logit_bias` as pairs of token and bias."""
        given = self.logit_bias
        return tuple(given.items() if isinstance(given, Mapping) else given)

    def _check_ends(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, not {self.max_tokens}")
        most = math.inf if self.max_tokens is None else self.max_tokens
        if not 0 <= self.min_tokens <= most:
            raise RequestError(
                f"min_tokens must be in [0, max_tokens = {self.max_tokens}], not {self.min_tokens}"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            if token < 0:
                raise RequestError(f"stop_token_ids must not be negative, got {token}")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stops)
        if len(stops) > _MOST_STOPS:
            raise RequestError(f"stop may have {_MOST_STOPS} texts, not {len(stops)}")
        for stop in stops:
            if not 1 <= len(stop) <= _LONGEST_STOP:
                raise RequestError(
                    f"a text of stop has 1 to {_LONGEST_STOP} characters, not {len(stop)}"
                )

    def _check_bias(self) -> None:
        given = self.biases
        if len(given) > _MOST_BIASES:
            raise RequestError(f"logit_bias may have {_MOST_BIASES} tokens, not {len(given)}")
        for token, bias in given:
            if token < 0:
                raise RequestError(f"logit_bias must not have negative tokens, got {token}")
            if not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias must be in [-100, 100], not {bias} for token {token}"
                )
        object.__setattr__(self, "logit_bias", given)

    def _check_whole(self, name: str) -> None:
        value = getattr(self, name)
        try:
            operator.index(0 if value is None else value)
        except TypeError:
            raise RequestError(f"{name} must be a whole number, not {value!r}") from None
