"""`loongjax bench policies`: short prompts beside long ones on a real engine."""

from __future__ import annotations

import json

import pytest

from loongjax.bench.policies import Load, measure_policy
from loongjax.cli.main import main
from loongjax.config import engine_config


@pytest.mark.parametrize("policy", ["elastic", "first_come"])
def test_short_prompts_come_as_long_as_there_are_long_ones(policy):
    config = engine_config(
        instances=2,
        pool_slots=1024,
        block_size=1,
        max_chunk_tokens=128,
        dtype="float32",
        policy=policy,
    )
    load = Load(short=3, rate=20.0, long=2, long_tokens=300)
    found = measure_policy("random:tiny", config, load)
    assert found["short"] >= 3
    assert 0.0 < found["short_ttft_s"]["p50"] <= found["short_ttft_s"]["p99"]
    assert found["unloaded_ttft_s"]["p50"] > 0.0
    assert found["long_ttft_s"] > 0.0
    assert found["tokens_per_s"] > 0.0


def test_the_command_prints_one_object(monkeypatch, capsys):
    said = {"short_ttft_s": {"p50": 0.1, "p99": 0.2}, "unloaded_ttft_s": {"p50": 0.1, "p99": 0.1}}
    said |= {"long_ttft_s": 3.0, "tokens_per_s": 9.0, "longest_chunk_s": 0.5, "short": 30}
    seen = []

    def measure(model, config, load):
        seen.append((model, config.policy, config.cluster.instances, load.long_tokens))
        return said

    monkeypatch.setattr("loongjax.bench.policies.measure_policy", measure)
    assert main(["bench", "policies", "--instances", "4", "--json"]) == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    found = json.loads(line)
    assert list(found["policies"]) == ["elastic", "loongserve"]
    assert found["policies"]["elastic"] == said
    assert seen[0] == ("random:bench58m", "elastic", 4, 30_000)
    assert main(["bench", "policies"]) == 0
    assert "elastic: TTFT of short prompts p50 0.10 s, p99 0.20 s" in capsys.readouterr().out


def test_a_load_of_nothing_is_refused(capsys):
    assert main(["bench", "policies", "--short", "0"]) == 2
    assert "--short and --long must be at least 1" in capsys.readouterr().err
