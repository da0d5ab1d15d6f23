from __future__ import annotations

from dataclasses import replace

import pytest

from loongjax.errors import RequestError
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.simulator import (
    Objective,
    find_goodput,
    fluid_rate,
    fluid_seconds,
    simulate,
)
from loongjax.simulator.bound import fluid_seconds_done
from tests.simulator.rig import job, toy_deployment

DEPLOYMENT = toy_deployment(instances=2)
POLICY = FirstCome(tokens_per_rank=1_024, headroom=8)


def jobs(count: int, *, gap: float = 1.0, prompt: int = 800, output: int = 4):
    return [job(f"r{i}", prompt, output, arrival=i * gap) for i in range(count)]


@pytest.mark.parametrize("case", [(30, 200, 12), (30, 1_500, 2), (12, 1_500, 30)])
def test_no_run_is_faster_than_the_fluid_bound(case):
    count, prompt, output = case
    together = jobs(count, gap=0.0, prompt=prompt, output=output)
    run = simulate(together, DEPLOYMENT, POLICY)
    assert fluid_seconds(together, DEPLOYMENT) < run.ended
    assert fluid_rate(together, DEPLOYMENT) * fluid_seconds(together, DEPLOYMENT) == pytest.approx(
        count
    )


def test_the_bound_of_long_prompts_is_reached_by_packing_them():
    """One instance, one token of answer: nothing but prefill, and constants are small."""
    alone = toy_deployment(instances=1, slots=100_000, chunk=100_000)
    long = jobs(5, gap=0.0, prompt=15_000, output=1)
    run = simulate(long, alone, FirstCome(tokens_per_rank=20_000))
    assert run.ended == pytest.approx(fluid_seconds(long, alone), rel=0.1)


def test_work_done_grows_from_nothing_to_all():
    run = simulate(jobs(6), DEPLOYMENT, POLICY)
    everything = fluid_seconds([outcome.job for outcome in run.outcomes], DEPLOYMENT)
    done = [fluid_seconds_done(run.outcomes, t, DEPLOYMENT) for t in (0.0, 1.5, 3.5, run.ended)]
    assert done == sorted(done)
    assert done[0] == 0.0
    assert done[-1] == pytest.approx(everything)


def test_the_search_finds_where_the_objective_begins_to_be_missed():
    objective = Objective(ttft_factor=0.0, ttft_floor_s=0.4, tpot_s=0.1)
    found = find_goodput(jobs(60), DEPLOYMENT, POLICY, objective, precision=0.05)
    assert 0.0 < found.sustainable <= found.every_class <= found.paper <= found.bound
    assert found.sustainable <= found.saturated <= found.bound
    for probe in found.probes:
        assert probe.requests == pytest.approx(60 * probe.rate / found.bound, abs=20)
        if probe.rate <= found.paper:
            assert probe.attained.total >= 0.9
    failed = [probe.rate for probe in found.probes if probe.attained.total < 0.9]
    assert failed
    assert min(failed) - found.paper <= 0.05 * found.bound


def test_a_search_that_begins_near_its_end_takes_fewer_runs():
    objective = Objective(ttft_factor=0.0, ttft_floor_s=0.4, tpot_s=0.1)
    usual = find_goodput(jobs(60), DEPLOYMENT, POLICY, objective)
    part = usual.paper / usual.bound
    for near, runs in ((part, 4), (part + 0.015, 4), (part - 0.09, len(usual.probes) + 4)):
        found = find_goodput(jobs(60), DEPLOYMENT, POLICY, objective, near=[near])
        assert found.paper == pytest.approx(usual.paper, abs=0.02 * usual.bound)
        assert len(found.probes) <= runs
    assert len(usual.probes) > 6


def test_a_class_of_its_own_lowers_the_rate_of_every_class_alone():
    """One request in twenty is too long to be served in time at any rate."""
    mixed = [replace(one, prompt=4_500) if i % 20 == 5 else one for i, one in enumerate(jobs(60))]
    objective = Objective(ttft_factor=0.0, ttft_floor_s=0.05, tpot_s=0.1)
    found = find_goodput(mixed, DEPLOYMENT, POLICY, objective, precision=0.2)
    assert found.paper > 0.0
    assert found.every_class == found.sustainable == 0.0


def test_too_few_requests_are_refused():
    with pytest.raises(RequestError, match="at least 20"):
        find_goodput(jobs(19), DEPLOYMENT, POLICY, Objective())
