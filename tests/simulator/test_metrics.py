from __future__ import annotations

from dataclasses import replace

import pytest

from loongjax.costmodel.protocol import ChunkWork
from loongjax.engine.history import History
from loongjax.simulator import Job, Objective, Outcome, Run, attainment, report
from loongjax.simulator.jobs import CLASSES, Ending, length_class
from loongjax.simulator.metrics import normalized_ms
from tests.simulator.rig import job, toy_deployment

DEPLOYMENT = toy_deployment()
STRICT = Objective(ttft_factor=2.0, ttft_floor_s=1.0, tpot_s=0.05)


def ended(
    one: Job, *, ttft: float | None = 0.5, tpot: float = 0.01, ending: Ending = "completed"
) -> Outcome:
    first = None if ttft is None else one.arrival + ttft
    end = one.arrival if first is None else first + tpot * (one.output - 1)
    return Outcome(job=one, ending=ending, first_token=first, end=end)


def finished(*outcomes: Outcome) -> Run:
    jobs = [outcome.job for outcome in outcomes]
    return Run(
        outcomes=outcomes,
        history=History(),
        started=min(one.arrival for one in jobs),
        last_arrival=max(one.arrival for one in jobs),
        ended=max(outcome.end for outcome in outcomes),
        steps=9,
        preemptions=1,
        scale_ups=2,
        scale_downs=3,
        migrated_bytes=4,
        busy_fraction=0.5,
        wall_s=0.1,
    )


def summed_up(*outcomes: Outcome) -> dict:
    run = finished(*outcomes)
    return report(run, DEPLOYMENT, policy="p", workload="w", objective=STRICT)


def test_latencies_are_per_token_and_means_of_requests():
    outcomes = [ended(job("a", 100, 11), ttft=1.0, tpot=0.1), ended(job("b", 10, 1), ttft=0.2)]
    found = normalized_ms(outcomes)
    assert found["total"] == pytest.approx(1e3 * (2.0 / 111 + 0.2 / 11) / 2)
    assert found["input"] == pytest.approx(1e3 * (1.0 / 100 + 0.2 / 10) / 2)
    assert found["output"] == pytest.approx(100.0)


def test_a_long_prompt_may_take_longer_to_its_first_token():
    one = job("a", prompt=100_000)
    alone = DEPLOYMENT.reference.prefill(2, [ChunkWork(100_000, 0)])
    assert 2 * alone > 1.0
    assert STRICT.ttft_limit(one, DEPLOYMENT) == 2 * alone
    assert STRICT.met(ended(one, ttft=1.99 * alone), DEPLOYMENT)
    assert not STRICT.met(ended(one, ttft=2.01 * alone), DEPLOYMENT)
    assert STRICT.met(ended(job("b"), ttft=0.99), DEPLOYMENT)
    assert not STRICT.met(ended(job("b"), ttft=1.01), DEPLOYMENT)


def test_slow_tokens_miss_the_objective_and_a_single_one_cannot():
    assert not STRICT.met(ended(job("a"), tpot=0.051), DEPLOYMENT)
    assert STRICT.met(ended(job("a", output=1)), DEPLOYMENT)


def test_the_default_objective_is_that_of_the_paper():
    assert Objective() == Objective(ttft_factor=25.0, ttft_floor_s=15.0, tpot_s=0.05)


@pytest.mark.parametrize("ending", ["rejected", "failed"])
def test_who_did_not_end_counts_as_a_miss(ending):
    outcomes = [ended(job("a")), ended(job("b"), ttft=None, ending=ending)]
    assert attainment(finished(*outcomes), DEPLOYMENT, STRICT).total == 0.5


def test_who_gave_up_does_not_count():
    outcomes = [ended(job("a")), ended(job("b"), ttft=None, ending="cancelled")]
    assert attainment(finished(*outcomes), DEPLOYMENT, STRICT).total == 1.0


def test_a_class_that_starves_shows():
    good = [ended(job(f"s{i}")) for i in range(9)]
    bad = ended(job("l", prompt=200_000), ttft=1e6)
    found = attainment(finished(*good, bad), DEPLOYMENT, STRICT)
    assert found.total == 0.9
    assert found.least == 0.0
    assert found.by_class == {"<4k": 1.0, ">128k": 0.0}


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        (1, "<4k"),
        (4_095, "<4k"),
        (4_096, "4k-32k"),
        (32_768, "32k-128k"),
        (131_071, "32k-128k"),
        (131_072, ">128k"),
        (10**6, ">128k"),
    ],
)
def test_classes_of_length(prompt, name):
    assert length_class(prompt) == name


def test_the_report_adds_up():
    late = replace(job("c", 50, 5), arrival=10.0)
    found = summed_up(
        ended(job("a", 5_000, 11), ttft=1.0, tpot=0.1),
        ended(late, ttft=0.5),
        ended(job("b"), ttft=None, ending="rejected"),
    )
    counts = ("requests", "completed", "unfinished", "rejected", "cancelled")
    assert [found[name] for name in counts] == [3, 2, 0, 1, 0]
    assert found["rate"] == pytest.approx(2 / 10.0)
    assert found["duration_s"] == pytest.approx(10.54)
    assert found["drain_s"] == pytest.approx(0.54)
    assert found["throughput_tokens_per_s"] == pytest.approx((5_011 + 55) / 10.54)
    assert found["bound_fraction"] == pytest.approx(
        found["throughput_tokens_per_s"] / found["bound_tokens_per_s"]
    )
    assert 0.0 < found["bound_fraction"] < 1.0
    assert set(found["by_class"]) == set(CLASSES)
    assert found["by_class"]["<4k"]["requests"] == 2
    assert found["by_class"]["<4k"]["slo_attainment"] == 0.5
    assert found["by_class"]["4k-32k"]["ttft_s"]["p50"] == 1.0
    assert found["by_class"][">128k"] == {
        "requests": 0,
        "ttft_s": {"p50": None, "p90": None, "p99": None},
        "tpot_s": {"p50": None, "p90": None, "p99": None},
        "slo_attainment": None,
    }


def test_a_run_without_a_completed_request_has_a_report():
    found = summed_up(ended(job("a"), ttft=None, ending="rejected"))
    assert found["slo_attainment"] == 0.0
    assert found["normalized_ms"] == {"total": None, "input": None, "output": None}
    assert found["bound_fraction"] is None
