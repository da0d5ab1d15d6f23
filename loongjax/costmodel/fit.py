"""From measured steps to coefficients: how long a step takes, by what it has to do.

Owns the formulas of time and how they are fitted: non-negative least squares over relative
errors, so that a step of 10 ms counts as much as one of 10 s. One fit is of one degree; what
lies between degrees is in `sib.py`. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from loongjax.costmodel.nnls import nnls
from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillFit:
    """Time of a prefill step [s].

        constant + token * sum(len) + square * sum(len^2 + 2 len history)
                 + history * sum(history)

    len: new tokens of a chunk; history: its tokens that were computed before. A causal prompt
    has len^2 / 2 pairs of query and key, and its history len * history more, so both weigh
    alike. Source: LoongServe (SOSP '24), its model of the prefill time, which has no history.

    Attributes:
      constant_s: Of a step of whole prompts, or of their first chunks, alone.
      resumed_constant_s: Of a step in which any chunk goes on from history; one that carries
        decoding requests along, too.
      token_s: For each new token: dense layers, and communication that nothing hides.
      square_s: For each unit of len^2: half a pair of query and key in attention.
      history_s: For each token of history: reading its KV, whatever the chunk's length.
    """

    constant_s: float
    resumed_constant_s: float
    token_s: float
    square_s: float
    history_s: float

    def seconds(self, chunks: Sequence[ChunkWork], computed: int | None = None) -> float:
        """The time of a step of these chunks; `computed` tokens, if it is padded."""
        tokens = squares = histories = 0
        for length, history in chunks:
            tokens += length
            squares += length * (length + 2 * history)
            histories += history
        constant = self.resumed_constant_s if histories else self.constant_s
        if computed is not None:
            tokens = computed
        work = self.token_s * tokens + self.square_s * squares + self.history_s * histories
        return constant + work


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeFit:
    """Time of a decode step [s].

        constant + kv_token * kv / degree + longest * longest / degree
                 + master_row * rows / masters + row * rows

    Attributes:
      constant_s: Reading the weights, launching, collectives.
      kv_token_s: Reading the KV of a token, all of which is spread evenly over the ranks.
      longest_s: The same for the request with most KV, over what `kv_token_s` says: one
        request alone does not keep a rank's cores busy.
      master_row_s: Dense layers of a row, on its master.
      row_s: What every rank does for every row: exchange of q, k, v and of partial results.
    """

    constant_s: float
    kv_token_s: float
    longest_s: float
    master_row_s: float
    row_s: float

    def seconds(self, degree: int, work: DecodeWork) -> float:
        """The time of a step at this degree."""
        rows, kv_tokens, masters, longest = work
        alike = kv_tokens / max(rows, 1)
        longest_tokens = alike if longest is None else longest
        return (
            self.constant_s
            + (self.kv_token_s * kv_tokens + self.longest_s * longest_tokens) / degree
            + (self.master_row_s / masters + self.row_s) * rows
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrateFit:
    """Time of moving KV from one instance to another [s]: constant + token * tokens."""

    constant_s: float
    token_s: float

    def seconds(self, tokens: int) -> float:
        """The time of a move."""
        return self.constant_s + self.token_s * tokens if tokens else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillSample:
    """A measured prefill step; `computed` tokens in all, if it was padded."""

    degree: int
    chunks: tuple[ChunkWork, ...]
    seconds: float
    computed: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSample:
    """A measured decode step."""

    degree: int
    work: DecodeWork
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrateSample:
    """A measured move of KV between two instances."""

    tokens: int
    seconds: float


def fit_prefill(samples: Sequence[PrefillSample]) -> PrefillFit:
    """Fits samples of one degree.

    Where no sample has history, its constant is that of fresh prompts, and reading it costs
    nothing beyond its pairs.

    Raises:
      ConfigError: Fewer samples than there are coefficients to find, other than the constant
        of chunks that go on.
    """
    resumed = any(chunk.history for sample in samples for chunk in sample.chunks)
    _check_count("prefill", samples, 4 if resumed else 3)
    found = _fit([_prefill_row(sample) for sample in samples], _seconds(samples))
    constants = (found[0], found[1] if resumed else found[0])
    return PrefillFit(
        constant_s=constants[0],
        resumed_constant_s=constants[1],
        token_s=found[2],
        square_s=found[3],
        history_s=found[4],
    )


def fit_decode(samples: Sequence[DecodeSample]) -> DecodeFit:
    """Fits samples of one degree. At degree 1 a row costs its master alone.

    Raises:
      ConfigError: Fewer than 4 samples.
    """
    _check_count("decode", samples, 4)
    found = _fit([_decode_row(sample) for sample in samples], _seconds(samples))
    return DecodeFit(
        constant_s=found[0],
        kv_token_s=found[1],
        longest_s=found[2],
        master_row_s=found[3],
        row_s=found[4],
    )


def fit_migrate(samples: Sequence[MigrateSample]) -> MigrateFit:
    """Fits moves.

    Raises:
      ConfigError: Fewer than 2 samples.
    """
    _check_count("migration", samples, 2)
    found = _fit([(1.0, float(sample.tokens)) for sample in samples], _seconds(samples))
    return MigrateFit(constant_s=found[0], token_s=found[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class FitErrors:
    """Relative errors of predictions: signed, one for each sample, in order."""

    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of their absolute values."""
        return float(np.mean(np.abs(self.errors)))

    @property
    def median(self) -> float:
        """Of their absolute values."""
        return float(np.median(np.abs(self.errors)))

    @property
    def worst(self) -> float:
        """The largest absolute value."""
        return float(np.max(np.abs(self.errors)))


def prefill_errors(fit: PrefillFit, samples: Sequence[PrefillSample]) -> FitErrors:
    """How far a fit is from samples."""
    return _errors([fit.seconds(sample.chunks) for sample in samples], samples)


def decode_errors(fit: DecodeFit, samples: Sequence[DecodeSample]) -> FitErrors:
    """How far a fit is from samples."""
    return _errors([fit.seconds(sample.degree, sample.work) for sample in samples], samples)


SampleT = TypeVar("SampleT", PrefillSample, DecodeSample)


def leave_one_out(
    samples: Sequence[SampleT], predict: Callable[[Sequence[SampleT], SampleT], float]
) -> FitErrors:
    """Errors at each sample of a fit to all others.

    Args:
      samples: Of one degree.
      predict: Fits the first argument and predicts the second [s].
    """
    everything = list(samples)
    predicted = [
        predict(everything[:i] + everything[i + 1 :], sample) for i, sample in enumerate(everything)
    ]
    return _errors(predicted, samples)


def _errors(predicted: Sequence[float], samples: Sequence[SampleT]) -> FitErrors:
    pairs = zip(predicted, samples, strict=True)
    return FitErrors(errors=tuple(seconds / sample.seconds - 1.0 for seconds, sample in pairs))


def _prefill_row(sample: PrefillSample) -> tuple[float, ...]:
    history = sum(chunk.history for chunk in sample.chunks)
    tokens = sample.computed or sum(chunk.tokens for chunk in sample.chunks)
    squares = sum(chunk.tokens * (chunk.tokens + 2 * chunk.history) for chunk in sample.chunks)
    work = (float(tokens), float(squares), float(history))
    return (float(not history), float(bool(history)), *work)


def _decode_row(sample: DecodeSample) -> tuple[float, ...]:
    rows, kv_tokens, masters, longest = sample.work
    longest_tokens = kv_tokens / rows if longest is None else float(longest)
    every_rank = float(rows) if sample.degree > 1 else 0.0
    return (
        1.0,
        kv_tokens / sample.degree,
        longest_tokens / sample.degree,
        rows / masters,
        every_rank,
    )


def _fit(rows: Sequence[tuple[float, ...]], seconds: np.ndarray) -> list[float]:
    relative = np.array(rows) / seconds[:, None]
    return [float(value) for value in nnls(relative, np.ones(len(rows)))]


def _seconds(samples: Sequence[PrefillSample | DecodeSample | MigrateSample]) -> np.ndarray:
    seconds = np.array([sample.seconds for sample in samples])
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise ConfigError(
            f"measured times must be positive and finite, found {seconds.min()} s; measure again"
        )
    return seconds


def _check_count(kind: str, samples: Sequence[object], least: int) -> None:
    if len(samples) < least:
        raise ConfigError(
            f"{len(samples)} {kind} samples of one degree are too few for a fit; measure at "
            f"least {least}"
        )
