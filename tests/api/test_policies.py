"""Every policy may serve on devices: tokens do not depend on who plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from loongjax import LLM, SamplingParams
from loongjax.api.build import build_engine, make_policy
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.errors import ConfigError
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.scheduler.policies.loongserve import LoongServe
from tests.api.test_llm_devices import count_ties, draw_prompts
from tests.costmodel.sibs import toy_sib


@pytest.fixture(scope="module")
def cost_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("cost") / "sib.json"
    toy_sib().save(path)
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.mark.parametrize("policy", ["loongserve", "chunked_prefill:chunk=32", "disaggregated"])
def test_tokens_do_not_depend_on_the_policy(policy, cost_model, programs):
    config = EngineConfig(
        cluster=ClusterConfig(instances=2, degrees=(1, 2)),
        pool=PoolConfig(block_size=1, slots=512),
        max_model_len=256,
        policy=policy,
        cost_model=cost_model,
        program_dir=programs,
    )
    built = build_engine("random:tiny", config)
    with LLM.from_engine(built.engine, built.tokenizer) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        outputs = llm.generate(draw_prompts(5, seed=3), params)
        assert [output.finish_reason for output in outputs] == ["length"] * 5
        assert sum(count_ties(output) for output in outputs) <= 1


def test_a_policy_gets_its_settings_and_its_cost_model(cost_model):
    assert make_policy(EngineConfig()) == FirstCome()
    policy = make_policy(EngineConfig(policy="loongserve:headroom=9", cost_model=cost_model))
    assert policy == LoongServe(cost=toy_sib(), headroom=9)


def test_a_policy_that_plans_by_time_needs_a_cost_model():
    with pytest.raises(ConfigError, match="'tp' plans by how long steps take; give a cost_model"):
        make_policy(EngineConfig(policy="tp"))
    with pytest.raises(ConfigError, match="no policy is called 'magic'"):
        make_policy(EngineConfig(policy="magic"))
    with pytest.raises(ConfigError, match="cannot read the cost model"):
        make_policy(EngineConfig(policy="tp", cost_model=Path("/no/such/file")))
