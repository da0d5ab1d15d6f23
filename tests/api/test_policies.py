"""Every policy may serve on devices: tokens do not depend on who plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loongjax import LLM, SamplingParams
from loongjax.api.build import make_policy, plan_engine
from loongjax.config import EngineConfig, engine_config
from loongjax.costmodel import DecodeWork
from loongjax.errors import ConfigError
from loongjax.profiler.fingerprint import fingerprint
from loongjax.scheduler.learning import Learning
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.scheduler.policies.loongserve import LoongServe
from tests.api.test_llm_devices import count_ties, draw_prompts
from tests.costmodel.sibs import toy_sib

OPTIONS = {
    "instances": 2,
    "degrees": (1, 2),
    "block_size": 1,
    "pool_slots": 512,
    "max_model_len": 256,
    "max_chunk_tokens": 256,
}


@pytest.fixture(scope="module")
def cost_model(tmp_path_factory):
    """Made up, as if it had been measured here."""
    plan = plan_engine("random:tiny", engine_config(**OPTIONS))[1]
    here = fingerprint("random:tiny", plan.shapes, plan.catalogue.max_chunk_tokens)
    path = tmp_path_factory.mktemp("cost") / "sib.json"
    replace(toy_sib(), fingerprint=here).save(path)
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.mark.parametrize("policy", ["loongserve", "chunked_prefill:chunk=32", "disaggregated"])
def test_tokens_do_not_depend_on_the_policy(policy, cost_model, programs):
    llm = LLM(
        "random:tiny",
        **OPTIONS,
        policy=policy,
        cost_model=cost_model,
        program_dir=programs,
    )
    with llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        outputs = llm.generate(draw_prompts(5, seed=3), params)
        assert [output.finish_reason for output in outputs] == ["length"] * 5
        assert sum(count_ties(output) for output in outputs) <= 1


def test_a_step_of_two_instances_takes_more_chunks_than_one_has_rows(cost_model, programs):
    policy = "chunked_prefill:chunk=80"
    llm = LLM("random:tiny", **OPTIONS, policy=policy, cost_model=cost_model, program_dir=programs)
    with llm:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        outputs = llm.generate([[name] * 4 for name in range(1, 45)], params)
        most = max(len(step.requests) for step in llm.steps() if step.kind == "prefill")
    assert [output.finish_reason for output in outputs] == ["length"] * 44
    assert most > 32


def test_a_policy_gets_its_settings_and_its_cost_model(cost_model):
    assert make_policy(EngineConfig()) == FirstCome()
    policy = make_policy(EngineConfig(policy="loongserve:headroom=9", cost_model=cost_model))
    assert isinstance(policy, Learning)
    assert policy.inner == LoongServe(cost=policy.cost, headroom=9)
    assert policy.cost.decode(2, DecodeWork(1, 9, 1)) == toy_sib().decode(2, DecodeWork(1, 9, 1))
    assert make_policy(EngineConfig(cost_model=cost_model)) == FirstCome()


def test_a_cost_model_of_something_else_is_refused(cost_model, programs):
    with pytest.raises(ConfigError, match=r"blocks of 1, steps of 512.*blocks of 16, steps of"):
        LLM(
            "random:tiny",
            **(OPTIONS | {"block_size": 16}),
            policy="loongserve",
            cost_model=cost_model,
            program_dir=programs,
        )


def test_a_policy_that_plans_by_time_needs_a_cost_model():
    with pytest.raises(ConfigError, match="'tp' plans by how long steps take; give a cost_model"):
        make_policy(EngineConfig(policy="tp"))
    with pytest.raises(ConfigError, match="no policy is called 'magic'"):
        make_policy(EngineConfig(policy="magic"))
    with pytest.raises(ConfigError, match="cannot read the cost model"):
        make_policy(EngineConfig(policy="tp", cost_model=Path("/no/such/file")))
