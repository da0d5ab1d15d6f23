from __future__ import annotations

import numpy as np
import pytest

from loongjax.errors import RequestError
from loongjax.simulator import at_rate, draw_jobs, is_workload, workload_names

COUNT = 20_000


def lengths(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    jobs = draw_jobs(name, COUNT, rate=1.0, seed=seed)
    return np.array([job.prompt for job in jobs]), np.array([job.output for job in jobs])


def near(value: float, wanted: float, part: float = 0.05) -> bool:
    return abs(value / wanted - 1) < part


def test_sharegpt_has_the_published_lengths():
    prompt, output = lengths("sharegpt")
    assert near(prompt.mean(), 897)
    assert near(np.median(prompt), 822)
    assert near(np.percentile(prompt, 90), 1826)
    assert (prompt.min(), prompt.max()) >= (4, 2200)
    assert prompt.max() <= 2300
    assert near(output.mean(), 233)
    assert near(np.median(output), 137, 0.1)
    assert near(np.percentile(output, 90), 602)
    assert output.max() <= 993


def test_leval_has_the_published_lengths_and_the_stated_tail():
    prompt, output = lengths("leval")
    assert 2_700 <= prompt.min() < 3_000
    assert 190_000 < prompt.max() <= 210_500
    assert near((prompt > 68_624).mean(), 0.078 * 0.31, 0.2)
    assert 12 <= np.median(output) <= 16
    assert near(np.percentile(output, 90), 139, 0.1)
    assert output.max() <= 968


def test_lveval_has_five_levels_between_the_published_ends():
    prompt, output = lengths("lveval")
    assert 15_000 <= prompt.min() < 15_300
    assert 400_000 < prompt.max() <= 497_300
    for level in (16_000, 32_000, 64_000, 128_000, 256_000):
        within = (prompt >= 0.94 * level) & (prompt < 1.3 * level)
        assert near(within.mean(), 0.2, 0.15)
    assert output.max() <= 128


def test_mixed_takes_a_third_of_each():
    prompt, _ = lengths("mixed")
    assert near((prompt <= 2_300).mean(), 1 / 3)
    assert near(
        prompt.mean(), sum(lengths(n)[0].mean() for n in ("sharegpt", "leval", "lveval")) / 3
    )


@pytest.mark.parametrize("exponent", [1.0, 1.4])
def test_zipf_weighs_lengths_by_their_power(exponent):
    prompt, output = lengths(f"zipf:{exponent}")
    assert prompt.min() >= 10
    assert prompt.max() <= 200_000
    weights = np.arange(10, 200_001) ** -exponent
    wanted = weights[:91].sum() / weights.sum()
    assert near((prompt <= 100).mean(), wanted)
    assert output[prompt > 69_000].max() <= 128
    assert output[prompt < 2_500].max() > 900


def test_the_same_seed_gives_the_same_jobs_and_the_rate_only_stretches_them():
    first, again = (draw_jobs("mixed", 50, rate=2.0, seed=7) for _ in range(2))
    assert first == again
    assert draw_jobs("mixed", 50, rate=2.0, seed=8) != first
    slow = draw_jobs("mixed", 50, rate=1.0, seed=7)
    assert [(job.prompt, job.output) for job in slow] == [(job.prompt, job.output) for job in first]
    np.testing.assert_allclose(
        [job.arrival for job in slow], [2 * job.arrival for job in first], rtol=1e-12
    )


@pytest.mark.parametrize("cv", [1.0, 3.0])
def test_arrivals_have_the_rate_and_the_variation(cv):
    jobs = draw_jobs("sharegpt", COUNT, rate=5.0, seed=0, cv=cv)
    gaps = np.diff([job.arrival for job in jobs])
    assert near(1 / gaps.mean(), 5.0, 0.1)
    assert near(gaps.std() / gaps.mean(), cv, 0.1)


def test_a_rate_is_exact_when_it_is_set():
    jobs = at_rate(draw_jobs("sharegpt", 101, rate=3.0, seed=0), 0.5)
    assert jobs[0].arrival == 0.0
    assert 100 / jobs[-1].arrival == pytest.approx(0.5)
    with pytest.raises(RequestError, match="two at different times"):
        at_rate(jobs[:1], 1.0)


def test_the_limit_says_nothing_of_the_answer():
    jobs = draw_jobs("sharegpt", 200, rate=1.0, seed=0)
    assert {job.limit for job in jobs} == {1024}
    short = draw_jobs("sharegpt", 200, rate=1.0, seed=0, limit=100)
    assert all(job.limit == max(100, job.output) for job in short)


@pytest.mark.parametrize("name", ["lmsys", "zipf:x", "zipf:", "zipf:-1", "zipf:11", "zipfy:1"])
def test_unknown_workloads_are_refused_with_the_known_names(name):
    with pytest.raises(RequestError, match="sharegpt, leval, lveval, mixed, zipf:A"):
        draw_jobs(name, 10, rate=1.0, seed=0)


def test_names_and_files_are_told_apart():
    assert all(is_workload(name) for name in workload_names())
    assert is_workload("zipf:1.2")
    assert not is_workload("trace.csv")


@pytest.mark.parametrize(("count", "rate", "cv"), [(0, 1.0, 1.0), (5, 0.0, 1.0), (5, 1.0, 0.0)])
def test_senseless_numbers_are_refused(count, rate, cv):
    with pytest.raises(RequestError, match="at least 1 request"):
        draw_jobs("sharegpt", count, rate=rate, seed=0, cv=cv)
