"""Every field of a `GenerateRequest` is honoured, means nothing, or is refused by name."""

from __future__ import annotations

import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb

from loongjax.errors import RequestError
from loongjax.sampling.params import SamplingParams
from serving.errors import UnsupportedError
from serving.grpc.vllm_request import to_call, to_sampling_params

HONOURED = {
    "temperature": 0.0,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.25,
    "frequency_penalty": -0.5,
    "presence_penalty": 1.0,
    "repetition_penalty": 1.5,
    "logit_bias": {3: 1.5, 0: -2.0},
    "n": 3,
    "seed": 0,
    "max_tokens": 7,
    "min_tokens": 2,
    "stop": ("end", "of"),
    "stop_token_ids": (4, 5),
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "logprobs": 0,
    "prompt_logprobs": 20,
}
WITHOUT_EFFECT = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "grammar_from_first_token": True,
}
OUT_OF_RANGE = {
    "top_p": 1.5,
    "min_p": -0.5,
    "frequency_penalty": 3.0,
    "presence_penalty": float("nan"),
    "repetition_penalty": -1.0,
    "logprobs": 21,
    "prompt_logprobs": -1,
    "logit_bias": {3: 101.0},
    "stop": [""],
    "truncate_prompt_tokens": 8,
}
GRAMMARS = {
    "json_schema": "{}",
    "regex": "a+",
    "grammar": "root ::= 'a'",
    "structural_tag": "x",
    "json_object": True,
    "choice": pb.ChoiceConstraint(choices=["a"]),
}


def test_no_field_is_forgotten():
    known = {*HONOURED, *WITHOUT_EFFECT, *GRAMMARS, "truncate_prompt_tokens"}
    assert {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} == known


def test_unset_means_the_default():
    assert to_sampling_params(pb.SamplingParams()) == SamplingParams()


def test_values_that_change_nothing_mean_unset():
    neutral = pb.SamplingParams(top_p=1.0, repetition_penalty=1.0, **WITHOUT_EFFECT)
    assert to_sampling_params(neutral) == SamplingParams()


def test_honoured_fields_arrive():
    found = to_sampling_params(pb.SamplingParams(**HONOURED))
    for name, value in HONOURED.items():
        given = dict(found.logit_bias) if name == "logit_bias" else getattr(found, name)
        assert given == value, name


@pytest.mark.parametrize("field", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(field):
    with pytest.raises(RequestError, match=rf"sampling_params.*{field}"):
        to_sampling_params(pb.SamplingParams(**{field: OUT_OF_RANGE[field]}))


@pytest.mark.parametrize("field", GRAMMARS)
def test_a_grammar_is_refused_by_name(field):
    with pytest.raises(UnsupportedError, match=rf"sampling_params\.{field}"):
        to_sampling_params(pb.SamplingParams(**{field: GRAMMARS[field]}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature must be"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"seed": -1}, "seed must be"),
        ({"n": 1000}, "n must be"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(RequestError, match=message):
        to_sampling_params(pb.SamplingParams(**fields))


OTHERS = {
    "kv_transfer_params": pb.KvTransferParams(remote_port=1),
    "mm_inputs": pb.MultimodalInputs(),
    "extra_mm_inputs": [pb.MultimodalInputs()],
    "kv_transfer_params_json": "{}",
    "media_refs": pb.MediaRefs(),
}


@pytest.mark.parametrize("field", OTHERS)
def test_other_inputs_are_refused_by_name(field):
    with pytest.raises(UnsupportedError, match=field):
        to_call(pb.GenerateRequest(text="a", **{field: OTHERS[field]}), client="me", name="x")


def test_no_field_of_the_request_is_forgotten():
    known = {"request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"}
    assert {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields} == known | set(OTHERS)


def test_a_rank_of_its_own_is_refused():
    to_call(pb.GenerateRequest(text="a", data_parallel_rank=0), client="me", name="x")
    with pytest.raises(RequestError, match="data_parallel_rank must be 0 or unset, not 2"):
        to_call(pb.GenerateRequest(text="a", data_parallel_rank=2), client="me", name="x")


def test_prompts_and_names():
    ids = pb.GenerateRequest(request_id="r", tokenized=pb.TokenizedInput(input_ids=[1, 2]))
    call = to_call(ids, client="me", name="other", priority=2, time_left_s=1.5)
    assert (call.name, call.prompt, call.priority, call.time_left_s) == ("other", (1, 2), 2, 1.5)
    assert to_call(pb.GenerateRequest(text=""), client="me", name="other").prompt == ""
    with pytest.raises(RequestError, match="no input"):
        to_call(pb.GenerateRequest(), client="me", name="other")
