"""How a request's next token is chosen: the user's side. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass

from loongjax.errors import RequestError

_SEED_LIMIT = 2**31
_MOST_SAMPLES = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling of one request.

    The choice is Gumbel-max, keyed by (seed, sample, position): the same request gives the same
    tokens whatever the degree, the group, or the company it runs in.

    Attributes:
      temperature: 0 takes the most likely token; above, logits are divided by it.
      n: Answers to each prompt, in [1, 128]. The prompt is computed once and its KV shared;
        answer i is the same whatever n is. At temperature 0 they are all alike.
      seed: Of the random draw, in [0, 2**31). None: drawn anew for each request.
      max_tokens: Tokens to generate at most; at least 1. None: up to the context's end.
      stop_token_ids: Further tokens that end the answer, beside the model's own. The
        token that ended it is among the output's ids, but not in its text.
      ignore_eos: Go on after the model's end tokens (`stop_token_ids` still end it).
    """

    temperature: float | int = 1.0
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:  # refuses NaN too
            raise RequestError(f"temperature must be in [0, 100], not {self.temperature}")
        object.__setattr__(self, "temperature", float(self.temperature))
        if not 1 <= self.n <= _MOST_SAMPLES:
            raise RequestError(f"n must be in [1, {_MOST_SAMPLES}], not {self.n}")
        if self.seed is not None and not 0 <= self.seed < _SEED_LIMIT:
            raise RequestError(f"seed must be in [0, {_SEED_LIMIT}), not {self.seed}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, not {self.max_tokens}")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token in self.stop_token_ids:
            if token < 0:
                raise RequestError(f"stop_token_ids must not be negative, got {token}")
