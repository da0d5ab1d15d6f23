"""`loongjax simulate`: what it prints, and how it refuses."""

from __future__ import annotations

import json

import pytest

from loongjax.cli.main import main
from loongjax.simulator import write_trace
from tests.costmodel.sibs import toy_sib
from tests.simulator.rig import job

FIELDS = {
    "policy",
    "workload",
    "rate",
    "requests",
    "completed",
    "unfinished",
    "rejected",
    "normalized_ms",
    "ttft_s",
    "tpot_s",
    "by_class",
    "slo_attainment",
    "throughput_tokens_per_s",
    "bound_fraction",
    "scale_ups",
    "scale_downs",
    "migrated_bytes",
    "wall_s",
}
SHORT = ["--workload", "leval", "--rate", "1", "--requests", "5"]


def simulate(*arguments: str) -> int:
    return main(["simulate", *arguments])


@pytest.fixture
def trace(tmp_path):
    """Forty chats, two a second."""
    path = tmp_path / "trace.jsonl"
    write_trace(path, [job(f"r{i}", 100 + i, 3, arrival=i / 2) for i in range(40)])
    return str(path)


def run_json(capsys, *arguments: str) -> dict:
    assert simulate(*arguments, "--json") == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    return json.loads(line)


def test_one_request_is_explained(capsys):
    report = run_json(capsys, *SHORT, "--policy", "elastic", "--explain", "r3")
    first, *rest = report["explained"]
    assert first.startswith("r3 came at")
    assert any("begins on" in line for line in rest), "why it ran where it did"
    assert any("step on" in line for line in rest)
    assert rest[-1].endswith("ended: stop")
    assert simulate(*SHORT, "--explain", "r77") == 2
    assert "no request 'r77'" in capsys.readouterr().err


def test_json_is_one_line_and_complete(capsys):
    report = run_json(capsys, *SHORT)
    assert set(report) >= FIELDS
    assert (report["policy"], report["workload"]) == ("elastic", "leval")
    assert (report["requests"], report["completed"], report["instances"]) == (5, 5, 4)
    assert set(report["normalized_ms"]) == {"total", "input", "output"}
    assert set(report["ttft_s"]) == set(report["tpot_s"]) == {"p50", "p90", "p99"}
    assert list(report["by_class"]) == ["<4k", "4k-32k", "32k-128k", ">128k"]
    assert set(report["by_class"]["<4k"]) == {"requests", "ttft_s", "tpot_s", "slo_attainment"}
    assert "goodput" not in report


def test_the_same_seed_gives_the_same_report(capsys):
    first, again = (run_json(capsys, *SHORT, "--seed", "4") for _ in range(2))
    del first["wall_s"], again["wall_s"]
    assert first == again


def test_goodput_is_searched(capsys, trace):
    report = run_json(capsys, "--workload", trace, "--goodput", "--instances", "1")
    found = report["goodput"]
    assert 0.0 < found["sustainable"] <= found["every_class"] <= found["paper"] <= found["bound"]
    assert report["rate"] == pytest.approx(found["sustainable"])


def test_a_trace_keeps_its_rate_unless_one_is_given(capsys, trace):
    assert run_json(capsys, "--workload", trace)["rate"] == pytest.approx(2.0)
    report = run_json(capsys, "--workload", trace, "--rate", "8", "--requests", "9")
    assert report["rate"] == pytest.approx(8.0)
    assert report["requests"] == 9


def test_a_measured_cost_model_can_be_given(capsys, trace, tmp_path):
    path = tmp_path / "sib.json"
    toy_sib().save(path)
    options = ["--hardware", str(path), "--model-shape", "tiny", "--workload", trace]
    report = run_json(capsys, *options, "--instances", "2")
    assert report["instances"] == 2
    assert report["ttft_s"]["p50"] == pytest.approx(0.02 + 1e-5 * 120 + 1e-9 * 120**2, rel=0.02)
    assert simulate(*options) == 2
    assert "--instances" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "instances"),
    [("tp", 1), ("chunked_prefill:chunk=512", 1), ("disaggregated", 2), ("static_sp", 4)],
)
def test_baselines_run_on_the_instances_that_they_are_made_for(capsys, policy, instances):
    report = run_json(capsys, *SHORT, "--policy", policy)
    assert (report["completed"], report["instances"]) == (5, instances)


def test_host_time_delays_everything(capsys):
    short = run_json(capsys, *SHORT)["tpot_s"]["p50"]
    long = run_json(capsys, *SHORT, "--host-us", "300,50000,10")["tpot_s"]["p50"]
    assert long > short + 0.03


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "1,2,-3", "1,2,nan", "1,inf,3"])
def test_host_time_is_three_numbers(capsys, text):
    with pytest.raises(SystemExit) as failed:
        simulate(*SHORT, "--host-us", text)
    assert failed.value.code == 2
    assert "three numbers of microseconds" in capsys.readouterr().err


def test_lines_for_people(capsys):
    assert simulate(*SHORT, "--hardware", "v5ex16", "--tensor-parallel", "4") == 0
    printed = capsys.readouterr().out
    assert "4 instances of 4" in printed
    assert "5 completed" in printed
    assert "of the fluid bound" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "sharegpt"], "--rate"),
        ([*SHORT, "--hardware", "a800"], "a800x8"),
        ([*SHORT, "--hardware", "b200x8"], "a100, a800, cpu, h100, v5e, v5p, v6e"),
        ([*SHORT, "--hardware", "a800x0"], "number of chips"),
        ([*SHORT, "--instances", "5"], "5 instances of 2 chips each do not fit a800x8"),
        ([*SHORT, "--instances", "0"], "--instances must be at least 1"),
        ([*SHORT, "--tensor-parallel", "16"], "do not fit"),
        ([*SHORT, "--model-shape", "gpt5"], "no random model is called 'gpt5'"),
        ([*SHORT, "--model-shape", "llama3-70b", "--tensor-parallel", "1"], "weights alone"),
        ([*SHORT, "--policy", "magic"], "known are chunked_prefill"),
        ([*SHORT, "--pool-slots", "3"], "--pool-slots"),
        ([*SHORT, "--block-size", "0"], "block"),
        ([*SHORT, "--requests", "0"], "--requests must be at least 1, not 0"),
        ([*SHORT, "--max-tokens", "0"], "--max-tokens must be at least 1"),
        ([*SHORT, "--burstiness", "0"], "finite and above 0"),
        ([*SHORT, "--burstiness", "inf"], "finite and above 0"),
        ([*SHORT, "--rate", "0"], "finite and above 0"),
        ([*SHORT, "--rate", "inf"], "finite and above 0"),
        ([*SHORT, "--seed", "-1"], "seed must not be negative, got -1"),
        ([*SHORT, "--tensor-parallel", "0"], "--tensor-parallel must be at least 1, not 0"),
        ([*SHORT, "--tensor-parallel", "3"], "does not divide the model's attention heads (32)"),
        ([*SHORT, "--max-chunk-tokens", "0"], "--max-chunk-tokens must be at least 1"),
        ([*SHORT, "--policy", "chunked_prefill:chunk=x"], "chunk must be a number"),
        (["--workload", "nope", "--rate", "1"], "workloads are sharegpt"),
        ([*SHORT, "--workload", "zipf:"], "zipf:A"),
        ([*SHORT, "--workload", "/no/such/trace"], "/no/such/trace"),
        ([*SHORT, "--goodput"], "at least 20"),
        (["--workload", "/no/such/trace", "--hardware", "/no/sib.json"], "cannot read"),
    ],
)
def test_a_users_mistake_exits_2_with_one_line(capsys, arguments, message):
    assert simulate(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("loongjax: ")]
    assert len(lines) == 1
    assert message in lines[0]
