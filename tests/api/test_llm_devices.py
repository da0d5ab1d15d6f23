"""`LLM` on emulated devices: many requests at once, against a plain forward pass."""

from __future__ import annotations

import gc
import os
import signal
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest

from loongjax import LLM, SamplingParams
from loongjax.api.build import build_engine
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.errors import BackendStartedError, CapacityError, ConfigError, RequestError
from loongjax.plan import Plan, Snapshot
from loongjax.scheduler.policies.first_come import FirstCome
from tests.esp.rig import TINY, reference_logits

EPSILON = 1e-4


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


def make(programs, **options) -> LLM:
    settings = {
        "instances": 4,
        "degrees": (1, 2, 4),
        "block_size": 1,
        "pool_slots": 512,
        "max_model_len": 256,
    }
    return LLM("random:tiny", program_dir=programs, **{**settings, **options})


def draw_prompts(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, TINY.vocab_size, rng.integers(1, 120)).tolist() for _ in range(count)]


def count_ties(output) -> int:
    """Checks every token against the reference; counts those that a tie may have decided."""
    tokens = [*output.prompt_token_ids, *output.token_ids]
    logits = reference_logits(tokens)
    ties = 0
    for position, token in enumerate(output.token_ids, len(output.prompt_token_ids) - 1):
        row, bound = logits[position], 2 * EPSILON * np.abs(logits).max()
        assert row.max() - row[token] <= bound
        ties += token != row.argmax()
    return ties


def used(llm: LLM) -> int:
    return sum(instance.used for instance in llm.stats().instances)


@pytest.mark.parametrize(("slots", "block_size"), [(512, 1), (96, 1), (96, 16)])
def test_many_requests_say_what_the_reference_says(programs, slots, block_size):
    """With 96 slots an instance, requests wait, spread, grow their groups, and are preempted."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with make(programs, pool_slots=slots, block_size=block_size) as llm:
        outputs = llm.generate(draw_prompts(24, seed=1), params)
        ties = sum(count_ties(output) for output in outputs)
        degrees = {run.degree for output in outputs for run in output.steps}
        assert used(llm) == 0
    assert all(output.finish_reason == "length" for output in outputs)
    assert all(len(output.token_ids) == 12 for output in outputs)
    assert ties <= 0.005 * 24 * 12
    assert len(degrees) > 1 or slots == 512


class Waiting:
    """A policy that waits for every step."""

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        return replace(FirstCome().schedule(now, snapshot), ahead=frozenset())


def test_one_step_ahead_changes_no_answer(programs):
    """Some end by length, some at a token that is known one step late."""
    config = EngineConfig(
        cluster=ClusterConfig(instances=2),
        pool=PoolConfig(block_size=4, slots=256),
        max_model_len=256,
        program_dir=programs,
    )
    prompts = draw_prompts(8, seed=5)
    params = [
        SamplingParams(temperature=float(i % 2), seed=i, max_tokens=6 + i, ignore_eos=True)
        for i in range(len(prompts))
    ]
    found = []
    for policy in (Waiting(), FirstCome()):
        engine = build_engine("random:tiny", config, policy).engine
        with LLM.from_engine(engine) as llm:
            whole = llm.generate(prompts, params)
            stops = [
                replace(one, stop_token_ids=(output.token_ids[4],)) if i % 4 < 2 else one
                for i, (one, output) in enumerate(zip(params, whole, strict=True))
            ]
            cut = llm.generate(prompts, stops)
            assert used(llm) == 0
            engine.check_integrity()
        found.append([(one.token_ids, one.finish_reason, one.stop_token) for one in whole + cut])
    assert found[0] == found[1]
    assert {reason for _, reason, _ in found[0]} == {"length", "stop"}


def test_long_prompts_are_computed_in_chunks(programs):
    """On groups that change from chunk to chunk, with short requests in between."""
    rng = np.random.default_rng(6)
    prompts = [rng.integers(0, TINY.vocab_size, length).tolist() for length in (300, 30, 270, 9)]
    config = EngineConfig(
        cluster=ClusterConfig(instances=2),
        pool=PoolConfig(block_size=4, slots=256),
        max_model_len=320,
        max_chunk_tokens=128,
        program_dir=programs,
    )
    built = build_engine("random:tiny", config)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM.from_engine(built.engine, built.tokenizer) as llm:
        outputs = llm.generate(prompts, params)
        assert used(llm) == 0
    prefills = [run.count for run in outputs[0].steps if run.kind == "prefill"]
    assert sum(prefills) >= 2  # 300 tokens do not fit 2 ranks of 128
    assert sum(count_ties(output) for output in outputs) == 0


def test_a_seed_gives_the_same_tokens_in_any_company(programs):
    prompts = draw_prompts(8, seed=2)
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=8, ignore_eos=True)
    with make(programs) as llm:
        together = [output.token_ids for output in llm.generate(prompts, params)]
        alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
        other = llm.generate(prompts[0], SamplingParams(seed=12, max_tokens=8))[0].token_ids
    assert together == alone
    assert other != alone[0]


def test_two_in_one_process_at_once(programs):
    """They share devices; launches are ordered, so neither waits for the other forever."""
    prompts = draw_prompts(10, seed=3)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    found: dict[int, list] = {}
    with make(programs) as first, make(programs, instances=2, degrees=(1, 2)) as second:

        def run(number: int, llm: LLM) -> None:
            found[number] = llm.generate(prompts, params)

        threads = [
            threading.Thread(target=run, args=(i, llm)) for i, llm in enumerate((first, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert used(first) == used(second) == 0
    for outputs in found.values():
        assert sum(count_ties(output) for output in outputs) == 0
    assert len(found) == 2


def test_bad_neighbours_cost_nobody_an_answer(programs):
    good = draw_prompts(3, seed=4)
    bad = [[], [TINY.vocab_size], [-1], [1] * 300]
    params = SamplingParams(temperature=0, max_tokens=4)
    with make(programs) as llm:
        outputs = llm.generate([good[0], bad[0], bad[1], good[1], bad[2], bad[3], good[2]], params)
        assert used(llm) == 0
    reasons = [output.finish_reason for output in outputs]
    assert [reason == "error" for reason in reasons] == [
        False,
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    assert "512" in outputs[2].error
    assert "300" in outputs[5].error


def test_refusals_name_value_and_limit(programs):
    with make(programs, pool_slots=32, degrees=(1, 2)) as llm:
        with pytest.raises(RequestError, match="empty"):
            llm.generate("")
        with pytest.raises(RequestError, match=r"256"):
            llm.generate([1] * 10, SamplingParams(max_tokens=250))
        with pytest.raises(CapacityError, match=r"64"):
            llm.generate([1] * 60, SamplingParams(max_tokens=10))
        assert used(llm) == 0
        with pytest.raises(BackendStartedError, match="JAX_NUM_CPU_DEVICES"):
            make(programs, instances=9, degrees=None)
    with pytest.raises(ConfigError, match="900"):
        make(programs, instances=900, degrees=None)
    with pytest.raises(ConfigError, match="5"):
        make(programs, degrees=(5,))
    with pytest.raises(ConfigError, match="3"):
        make(programs, instances=1, degrees=None, tensor_parallel=3)


def test_leaving_a_stream_frees_its_kv(programs):
    with make(programs) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        stream.close()
        llm.generate([4, 5], SamplingParams(max_tokens=2))
        assert used(llm) == 0


EVERYTHING = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1, top_k=30, top_p=0.8, logprobs=2),
    SamplingParams(seed=2, min_p=0.1, n=3, prompt_logprobs=1),
    SamplingParams(temperature=0, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=0),
    SamplingParams(seed=3, presence_penalty=1.0, logit_bias={7: 3.0}, min_tokens=4),
    SamplingParams(seed=4, top_p=0.5, stop="e", stop_token_ids=[9], ignore_eos=True),
]


def test_everything_at_once_says_what_each_says_alone(programs):
    """At other degrees, in other company, with another pool: the same tokens and scores."""
    each = [replace(params, max_tokens=10) for params in EVERYTHING]
    prompts = draw_prompts(len(each), seed=5)
    with make(programs, pool_slots=96) as llm:
        together = llm.generate(prompts, each)
        assert used(llm) == 0
    with make(programs, instances=1, degrees=(1,), block_size=16) as llm:
        alone = [llm.generate(prompt, own)[0] for prompt, own in zip(prompts, each, strict=True)]
        chunks = [list(llm.stream(prompts[i], each[i])) for i in (0, 5)]
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert (one.token_ids, one.text) == (other.token_ids, other.text)
            assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
            assert [given.token for given in one.logprobs or ()] == [
                given.token for given in other.logprobs or ()
            ]
            assert [given.logprob for given in one.logprobs or ()] == pytest.approx(
                [given.logprob for given in other.logprobs or ()], abs=1e-3
            )
    assert ["".join(chunk.text for chunk in said) for said in chunks] == [
        alone[0].text,
        alone[5].text,
    ]
    scores = together[2].prompt_logprobs
    prompt = together[2].prompt_token_ids
    assert [given and given.token for given in scores] == [None, *prompt[1:]]
    logits = reference_logits(prompt).astype(np.float64)
    for position, given in enumerate(scores[1:], 1):
        row = logits[position - 1]
        expected = row[prompt[position]] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert given.logprob == pytest.approx(expected, abs=1e-3)
    assert len({given.token_ids for given in together[2].outputs}) == 3
    counts = [len(given.logprobs) for given in together[1].outputs]
    assert counts == [len(together[1].token_ids)]


def test_a_prompt_of_several_blocks_is_scored_once_for_all_its_answers(programs):
    """The part that the answers share is computed by itself, up to a block's end."""
    prompt = draw_prompts(3, seed=9)[2]
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    with make(programs, instances=1, degrees=(1,), block_size=16) as llm:
        (one,) = llm.generate(prompt, params)
        (many,) = llm.generate(prompt, replace(params, n=2))
    assert len(prompt) > 33
    assert [given and given.token for given in many.prompt_logprobs] == [None, *prompt[1:]]
    for given, expected in zip(many.prompt_logprobs[1:], one.prompt_logprobs[1:], strict=True):
        assert given.logprob == pytest.approx(expected.logprob, abs=1e-3)


def live_bytes() -> int:
    """What all arrays of this process take on the devices, the dead ones collected."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_closing_gives_memory_and_devices_back(programs):
    """The next one may ask for all devices; `close` counts, not the end of the object."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    before = live_bytes()
    llm = make(programs)
    (first,) = llm.generate([[1, 2, 3]], params)
    assert live_bytes() - before > 1 << 20  # four pools of 512 tokens, and the weights
    llm.close()
    assert live_bytes() <= before
    with make(programs, instances=8, degrees=(1, 2)) as other:
        (second,) = other.generate([[1, 2, 3]], params)
    assert first.token_ids == second.token_ids
    assert live_bytes() <= before


def test_an_interrupt_costs_the_call_and_not_the_engine(programs):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with make(programs, instances=2, degrees=(1, 2)) as llm:
            expected = llm.generate([1, 2, 3], params)[0].token_ids
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[1, 2, 3]] * 64, replace(params, max_tokens=240))
            assert llm.generate([1, 2, 3], params)[0].token_ids == expected
            assert used(llm) == 0
    finally:
        signal.signal(signal.SIGINT, before)
