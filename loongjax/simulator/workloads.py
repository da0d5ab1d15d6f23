"""Workloads: lengths drawn to match published statistics, and arrivals drawn around a rate.

No data set is shipped. A length is drawn from a piecewise linear quantile function whose
corners are published or measured percentiles; what had to be assumed is said at each
workload. All draws come from one seed, and lengths do not depend on the rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from loongjax.errors import RequestError
from loongjax.simulator.jobs import Job

Generator = np.random.Generator
Quantiles = tuple[tuple[float, int], ...]

_SHAREGPT_PROMPT: Quantiles = (
    (0.0, 4), (0.05, 29), (0.1, 143), (0.2, 335), (0.3, 459), (0.4, 620), (0.5, 822),
    (0.6, 978), (0.7, 1202), (0.8, 1502), (0.9, 1826), (0.95, 2021), (0.99, 2202), (1.0, 2300),
)  # fmt: skip
_SHAREGPT_OUTPUT: Quantiles = (
    (0.0, 4), (0.1, 11), (0.2, 18), (0.3, 28), (0.4, 51), (0.5, 137), (0.6, 239), (0.7, 334),
    (0.8, 440), (0.9, 602), (0.95, 765), (0.99, 974), (1.0, 993),
)  # fmt: skip
_LEVAL_PROMPT: Quantiles = (
    (0.0, 2749), (0.05, 3380), (0.1, 3647), (0.2, 3981), (0.3, 5314), (0.4, 6119), (0.5, 7734),
    (0.6, 9186), (0.7, 13_737), (0.8, 18_015), (0.9, 22_130), (0.95, 28_999), (0.99, 47_695),
    (1.0, 68_624),
)  # fmt: skip
_LEVAL_CODE: Quantiles = ((0.0, 26_600), (1.0, 36_500))
_LEVAL_NOVELS: Quantiles = (
    (0.0, 10_000), (0.25, 30_000), (0.5, 47_000), (0.75, 75_000), (0.9, 125_000), (1.0, 210_500),
)  # fmt: skip
_LEVAL_OUTPUT: Quantiles = (
    (0.0, 1), (0.2, 1), (0.3, 4), (0.4, 7), (0.5, 14), (0.6, 26), (0.7, 46), (0.8, 82),
    (0.9, 139), (0.95, 252), (0.99, 543), (1.0, 968),
)  # fmt: skip
_LVEVAL_LEVELS = (16_000, 32_000, 64_000, 128_000, 256_000)
_LVEVAL_TOKENS_PER_WORD = (15_100 / 16_000, 497_300 / 256_000)
_LVEVAL_SKEW = 20
_LVEVAL_OUTPUT: Quantiles = ((0.0, 1), (0.5, 10), (0.9, 40), (1.0, 128))
_ZIPF_RANGE = (10, 200_000)


class Lengths(NamedTuple):
    """Lengths of many requests [tokens]."""

    prompt: Int[np.ndarray, " requests"]
    output: Int[np.ndarray, " requests"]


def sharegpt(rng: Generator, count: int) -> Lengths:
    """Short chats: prompts of 4 to 2.3K tokens (mean 897), answers of 4 to 993 (mean 233).

    Corners are percentiles of the sample that LoongServe published. Prompt and answer are
    drawn apart; there, their rank correlation is 0.03.
    """
    return Lengths(_draw(rng, _SHAREGPT_PROMPT, count), _draw(rng, _SHAREGPT_OUTPUT, count))


def leval(rng: Generator, count: int) -> Lengths:
    """L-Eval: prompts of 2.7K to 210.5K tokens, short answers (median 14, at most 968).

    Corners are percentiles of 18 of its 20 tasks, which end at 68,624 tokens. Assumed of the
    others, from what the benchmark's authors say of them: 3.8 % of requests on code of 26.6K
    to 36.5K tokens, and 7.8 % on whole novels of 10K to 210.5K, in the mean 62K. Answers are
    drawn apart from prompts.
    """
    prompt = _draw(rng, _LEVAL_PROMPT, count)
    task = rng.random(count)
    code, novels = _draw(rng, _LEVAL_CODE, count), _draw(rng, _LEVAL_NOVELS, count)
    prompt = np.where(task < 0.038, code, np.where(task < 0.038 + 0.078, novels, prompt))
    return Lengths(prompt, _draw(rng, _LEVAL_OUTPUT, count))


def lveval(rng: Generator, count: int) -> Lengths:
    """LV-Eval: prompts of 15.1K to 497.3K tokens, very short answers.

    Its lengths in tokens are not public. Assumed: a fifth of the requests at each of its
    levels of 16K, 32K, 64K, 128K and 256K words; 0.94 to 1.94 tokens a word, which are the two
    published ends, and nearly always close to the lower one (mean 0.99): with more, the 0.201
    requests/s that were published for 8 A800 would be more than these can compute. Answers
    with a median of 10 and at most 128 tokens.
    """
    words = rng.choice(np.array(_LVEVAL_LEVELS), count)
    least, most = _LVEVAL_TOKENS_PER_WORD
    prompt = words * (least + (most - least) * rng.random(count) ** _LVEVAL_SKEW)
    return Lengths(np.rint(prompt).astype(np.int64), _draw(rng, _LVEVAL_OUTPUT, count))


def mixed(rng: Generator, count: int) -> Lengths:
    """ShareGPT, L-Eval and LV-Eval, a third each, shuffled."""
    parts = [draw(rng, count) for draw in (sharegpt, leval, lveval)]
    source = rng.integers(0, len(parts), count)
    return Lengths(
        np.choose(source, [part.prompt for part in parts]),
        np.choose(source, [part.output for part in parts]),
    )


def zipf(exponent: float) -> Callable[[Generator, int], Lengths]:
    """Prompts of 10 to 200K tokens, each length with a weight of 1 / length ** exponent.

    The published answers are those of the nearest request of the other workloads. So here:
    below 2.5K tokens as in ShareGPT, below 69K as in L-Eval, above as in LV-Eval.
    """
    low, high = _ZIPF_RANGE
    lengths = np.arange(low, high + 1)
    cumulative = np.cumsum(lengths.astype(np.float64) ** -exponent)

    def draw(rng: Generator, count: int) -> Lengths:
        prompt = lengths[np.searchsorted(cumulative, rng.random(count) * cumulative[-1])]
        short = _draw(rng, _SHAREGPT_OUTPUT, count)
        middle, long = _draw(rng, _LEVAL_OUTPUT, count), _draw(rng, _LVEVAL_OUTPUT, count)
        output = np.where(prompt < 2_500, short, np.where(prompt < 69_000, middle, long))
        return Lengths(prompt, output)

    return draw


_NAMED: dict[str, Callable[[Generator, int], Lengths]] = {
    "sharegpt": sharegpt,
    "leval": leval,
    "lveval": lveval,
    "mixed": mixed,
}


def workload_names() -> tuple[str, ...]:
    """Names that `draw_jobs` knows; `zipf:A` stands for any exponent."""
    return (*_NAMED, "zipf:A")


def is_workload(name: str) -> bool:
    """Whether this names a generator, rather than a file."""
    return name in _NAMED or name.startswith("zipf:")


def draw_jobs(
    name: str, count: int, *, rate: float, seed: int, cv: float = 1.0, limit: int | None = None
) -> list[Job]:
    """Draws a workload.

    Args:
      name: One of `workload_names`.
      count: How many requests.
      rate: Requests a second in the mean.
      seed: Of all draws.
      cv: Coefficient of variation of the gaps between arrivals. 1: Poisson; above: gamma
        distributed gaps, which come in bursts.
      limit: `max_tokens` of every request, which the scheduler sees; never less than what its
        answer takes. None: 1,024, which all answers stay below.

    Raises:
      RequestError: An unknown name, or a number out of range.
    """
    if count < 1 or not 0.0 < rate < math.inf or not 0.0 < cv < math.inf:
        raise RequestError(
            f"a workload needs at least 1 request, at a rate and with a variation that are finite "
            f"and above 0; asked for are {count} at {rate} a second with {cv}"
        )
    if seed < 0:
        raise RequestError(f"seed must not be negative, got {seed}")
    rng = np.random.default_rng(seed)
    lengths = _generator(name)(rng, count)
    arrivals = draw_arrivals(rng, count, cv) / rate
    told = 1024 if limit is None else limit
    rows = zip(arrivals.tolist(), lengths.prompt.tolist(), lengths.output.tolist(), strict=True)
    return [
        Job(id=f"r{i}", arrival=arrival, prompt=prompt, output=output, limit=max(told, output))
        for i, (arrival, prompt, output) in enumerate(rows)
    ]


def draw_arrivals(rng: Generator, count: int, cv: float = 1.0) -> Float[np.ndarray, " requests"]:
    """Times of arrivals at one a second in the mean; see `draw_jobs` for `cv`."""
    shape = 1.0 / cv**2
    return np.cumsum(rng.gamma(shape, 1.0 / shape, count))


def _generator(name: str) -> Callable[[Generator, int], Lengths]:
    if name in _NAMED:
        return _NAMED[name]
    kind, _, number = name.partition(":")
    try:
        exponent = float(number)
    except ValueError:
        exponent = float("nan")
    if kind != "zipf" or not 0.0 <= exponent <= 10.0:
        raise RequestError(
            f"no workload is called {name!r}; known are {', '.join(workload_names())} with A in "
            "[0, 10], or give the path of a trace"
        )
    return zipf(exponent)


def _draw(rng: Generator, quantiles: Quantiles, count: int) -> Int[np.ndarray, " requests"]:
    shares, values = zip(*quantiles, strict=True)
    return np.rint(np.interp(rng.random(count), shares, values)).astype(np.int64)
