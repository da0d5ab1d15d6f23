"""Every policy may serve on devices: tokens do not depend on who plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loongjax import LLM, SamplingParams
from loongjax.api.build import build_engine, make_policy, plan_engine
from loongjax.config import engine_config
from loongjax.costmodel import ChunkWork, DecodeWork
from loongjax.costmodel.sib import ESTIMATE
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


def test_a_policy_gets_its_settings_and_its_cost_model():
    assert make_policy("first_come:headroom=0", toy_sib()) == FirstCome(headroom=0)
    policy = make_policy("loongserve:headroom=9", toy_sib())
    assert isinstance(policy, Learning)
    assert policy.inner == LoongServe(cost=policy.cost, headroom=9)
    assert policy.cost.decode(2, DecodeWork(1, 9, 1)) == toy_sib().decode(2, DecodeWork(1, 9, 1))


def test_an_estimate_may_be_corrected_by_more_than_what_was_measured():
    measured = toy_sib()
    made = replace(measured.fingerprint, software=ESTIMATE)
    bounds = [
        make_policy("elastic", cost).cost.bound
        for cost in (measured, replace(measured, fingerprint=made))
    ]
    assert bounds[0] < bounds[1]


def test_without_a_cost_model_times_are_estimated_and_the_log_says_so(programs, caplog):
    options = OPTIONS | {"program_dir": programs}
    with caplog.at_level("INFO"):
        built = build_engine("random:tiny", engine_config(**options))
    with built.engine:
        assert built.config.policy == "elastic"
        assert built.cost.is_estimate
        assert built.cost.pool_slots == 512
        assert built.cost.padding is not None
        assert built.cost.prefill(2, [ChunkWork(64, 0)]) > built.cost.prefill(2, [ChunkWork(8, 0)])
    assert any("elastic plans with times estimated" in line for line in caplog.messages)


def test_a_cost_model_of_something_else_is_refused(cost_model, programs):
    with pytest.raises(ConfigError, match=r"blocks of 1, steps of 512.*blocks of 16, steps of"):
        LLM(
            "random:tiny",
            **(OPTIONS | {"block_size": 16}),
            policy="loongserve",
            cost_model=cost_model,
            program_dir=programs,
        )


def test_a_policy_that_does_not_exist_is_refused_before_anything_is_loaded():
    for options, said in (
        ({"policy": "magic"}, "no policy is called 'magic'"),
        ({"policy": "elastic:chunk_s=0"}, "chunk_s must be positive"),
        ({"policy": "tp", "cost_model": "/no/such/file"}, "cannot read the cost model"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan_engine("random:tiny", engine_config(**options))
