from __future__ import annotations

import numpy as np
import pytest

from loongjax.costmodel.fit import (
    DecodeFit,
    DecodeSample,
    MigrateFit,
    MigrateSample,
    PrefillFit,
    PrefillSample,
    decode_errors,
    fit_decode,
    fit_migrate,
    fit_prefill,
    leave_one_out,
    prefill_errors,
)
from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.errors import ConfigError

PREFILL = PrefillFit(
    constant_s=0.03, resumed_constant_s=0.01, token_s=1e-5, square_s=2e-10, history_s=5e-8
)
DECODE = DecodeFit(constant_s=0.01, kv_token_s=2e-7, longest_s=5e-8, master_row_s=3e-5, row_s=1e-5)
FRESH = [(100,), (1_000,) * 8, (20_000,), (200_000,), (500_000,), (4_000,) * 3]
RESUMED = [((1, 5_000),), ((512, 50_000), (1, 900)), ((8_000, 8_000),), ((2_000, 300_000),)]


def prefill_samples(*, resumed: bool = True, noise: float = 0.0) -> list[PrefillSample]:
    rng = np.random.default_rng(1)
    chunks = [tuple(ChunkWork(length, 0) for length in step) for step in FRESH]
    if resumed:
        chunks += [tuple(ChunkWork(*chunk) for chunk in step) for step in RESUMED]
    return [
        PrefillSample(
            degree=4, chunks=step, seconds=PREFILL.seconds(step) * (1 + noise * rng.normal())
        )
        for step in chunks
    ]


def decode_samples(degree: int, noise: float = 0.0) -> list[DecodeSample]:
    rng = np.random.default_rng(2)
    cases = [(1, 10, 1), (1, 400_000, 1), (512, 512_000, 4), (128, 640_000, 2), (16, 800_000, 1)]
    cases += [(64, 640_000, 4), (256, 20_000, 4), (4, 400_000, 2)]
    work = [DecodeWork(rows, kv, min(masters, degree)) for rows, kv, masters in cases]
    return [
        DecodeSample(
            degree=degree,
            work=one,
            seconds=DECODE.seconds(degree, one) * (1 + noise * rng.normal()),
        )
        for one in work
    ]


def values(fit: object) -> list[float]:
    return [getattr(fit, name) for name in fit.__slots__]


def test_the_formula_of_prefill():
    chunks = [ChunkWork(1_000, 0), ChunkWork(10, 2_000)]
    assert PREFILL.seconds(chunks[:1]) == pytest.approx(0.03 + 1e-5 * 1_000 + 2e-10 * 1_000**2)
    squares = 1_000**2 + 10**2 + 2 * 10 * 2_000
    assert PREFILL.seconds(chunks) == pytest.approx(
        0.01 + 1e-5 * 1_010 + 2e-10 * squares + 5e-8 * 2_000
    )


def test_history_costs_what_the_longer_prompt_would():
    """Two halves of a prompt weigh as much as the whole, but for constants and reading."""
    whole = PREFILL.seconds([ChunkWork(2_000, 0)]) - PREFILL.constant_s
    first = PREFILL.seconds([ChunkWork(1_000, 0)]) - PREFILL.constant_s
    second = PREFILL.seconds([ChunkWork(1_000, 1_000)]) - PREFILL.resumed_constant_s
    assert first + second == pytest.approx(whole + PREFILL.history_s * 1_000)


def test_the_formula_of_decode():
    work = DecodeWork(rows=8, kv_tokens=4_000, masters=2, longest=1_000)
    seconds = 0.01 + 2e-7 * 4_000 / 4 + 5e-8 * 1_000 / 4 + 3e-5 * 8 / 2 + 1e-5 * 8
    assert DECODE.seconds(4, work) == pytest.approx(seconds)
    alike = work._replace(longest=None)
    assert DECODE.seconds(4, alike) == DECODE.seconds(4, work._replace(longest=500))
    assert DECODE.seconds(4, DecodeWork(0, 0, 1)) == DECODE.constant_s


def test_exact_times_give_exact_coefficients():
    np.testing.assert_allclose(values(fit_prefill(prefill_samples())), values(PREFILL), rtol=1e-5)
    np.testing.assert_allclose(values(fit_decode(decode_samples(4))), values(DECODE), rtol=1e-5)
    moves = [MigrateSample(tokens=n, seconds=1e-3 + 2e-6 * n) for n in (10, 1_000, 50_000)]
    fit = fit_migrate(moves)
    assert fit.seconds(700) == pytest.approx(1e-3 + 2e-6 * 700)
    assert MigrateFit(constant_s=1.0, token_s=1.0).seconds(0) == 0.0


def test_without_history_its_constant_is_that_of_fresh_prompts():
    fit = fit_prefill(prefill_samples(resumed=False))
    assert fit.resumed_constant_s == fit.constant_s == pytest.approx(0.03)
    assert fit.history_s == 0.0


def test_at_degree_1_a_row_costs_its_master_alone():
    fit = fit_decode(decode_samples(1))
    assert fit.row_s == 0.0
    assert fit.master_row_s == pytest.approx(DECODE.master_row_s + DECODE.row_s)


def test_errors_are_relative_so_that_noise_of_5_percent_stays_5_percent():
    samples = prefill_samples(noise=0.05)
    assert prefill_errors(fit_prefill(samples), samples).worst < 0.15
    decodes = decode_samples(4, noise=0.05)
    assert decode_errors(fit_decode(decodes), decodes).mean < 0.06


def test_leaving_one_out_fits_to_the_others_alone():
    samples = prefill_samples(resumed=False)
    seen = []

    def predict(others, one):
        seen.append((len(others), one in others))
        return fit_prefill(others).seconds(one.chunks)

    errors = leave_one_out(samples, predict)
    assert seen == [(len(samples) - 1, False)] * len(samples)
    assert errors.worst < 1e-6
    assert errors.median <= errors.mean <= errors.worst


@pytest.mark.parametrize(
    ("fit", "samples"),
    [
        (fit_prefill, prefill_samples()[:2]),
        (fit_prefill, prefill_samples()[5:8]),
        (fit_decode, decode_samples(4)[:3]),
        (fit_migrate, [MigrateSample(tokens=1, seconds=1.0)]),
    ],
)
def test_too_few_samples_are_refused(fit, samples):
    with pytest.raises(ConfigError, match="measure at least"):
        fit(samples)


def test_a_time_of_zero_is_refused():
    samples = [MigrateSample(tokens=1, seconds=1.0), MigrateSample(tokens=2, seconds=0.0)]
    with pytest.raises(ConfigError, match="positive"):
        fit_migrate(samples)
