"""What is asked of the sampling arrives at a real server, and what it says comes back.

One request that asks for everything is told to both gRPC services and over HTTP: all say the same.
That the answer is right is shown where the fields are, in `tests/sampling` and `tests/executor`.
"""

from __future__ import annotations

import math

import openai
import pytest
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc

from loongjax.sampling.params import SamplingParams
from serving.client import Client
from tests.serving.server import PATIENCE_S

pytestmark = pytest.mark.xdist_group("server")

ASKED = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.25,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {101: 4.0, 102: -100.0},
    "seed": 11,
    "max_tokens": 8,
    "min_tokens": 2,
    "logprobs": 2,
    "prompt_logprobs": 1,
}
PROMPT = "hello"


@pytest.fixture(scope="module")
def client(running):
    with Client(running.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def answer(client):
    return client.generate(PROMPT, SamplingParams(**ASKED)).completions[0]


@pytest.fixture(scope="module")
def http(running):
    with openai.OpenAI(
        base_url=f"{running.http}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client


def test_each_token_has_its_logprobs(client, answer):
    assert len(answer.token_ids) == len(answer.logprobs) == 8
    assert [each.token for each in answer.logprobs] == list(answer.token_ids)
    assert [each.token for each in answer.prompt_logprobs] == list(b"ello")
    for each in (*answer.logprobs, *answer.prompt_logprobs):
        assert each.logprob <= each.top[0][1] <= 0
        assert (each.rank == 1) == (each.token == each.top[0][0])
    assert {len(each.top) for each in answer.logprobs} == {2}
    plain = client.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))
    assert plain.token_ids != answer.token_ids
    assert plain.completions[0].logprobs == ()


def test_vllms_service_says_the_same(channel, answer):
    sampling = vllm.SamplingParams(**ASKED)
    request = vllm.GenerateRequest(text=PROMPT, sampling_params=sampling)
    stub = vllm_grpc.VllmEngineStub(channel)
    (response,) = stub.Generate(request, timeout=PATIENCE_S)
    whole = response.complete
    assert tuple(whole.output_ids) == answer.token_ids
    said = whole.output_logprobs
    assert list(said.token_ids) == list(answer.token_ids)
    assert list(said.token_logprobs) == [each.logprob for each in answer.logprobs]
    assert [list(top.token_ids) for top in said.top_logprobs] == [
        [token for token, _ in each.top] for each in answer.logprobs
    ]
    read = whole.input_logprobs
    assert list(read.token_ids) == list(PROMPT.encode())
    assert not read.token_logprobs[0].HasField("value")
    assert [each.value for each in read.token_logprobs[1:]] == [
        each.logprob for each in answer.prompt_logprobs
    ]
    request.stream = True
    *chunks, last = stub.Generate(request, timeout=PATIENCE_S)
    assert last == response
    streamed = [value for each in chunks for value in each.chunk.output_logprobs.token_logprobs]
    assert streamed == list(said.token_logprobs)
    assert chunks[0].chunk.input_logprobs == read


def http_arguments(**others):
    theirs = ("top_k", "min_p", "repetition_penalty", "min_tokens", "prompt_logprobs")
    asked = {name: value for name, value in ASKED.items() if name not in theirs}
    asked["logit_bias"] = {str(token): bias for token, bias in ASKED["logit_bias"].items()}
    body = {name: ASKED[name] for name in theirs} | {"return_token_ids": True}
    return {"model": "tiny", **asked, "extra_body": body, **others}


def test_http_says_the_same(http, answer):
    found = http.completions.create(prompt=PROMPT, **http_arguments()).choices[0]
    assert tuple(found.model_extra["token_ids"]) == answer.token_ids
    said = found.logprobs
    assert said.token_logprobs == pytest.approx([each.logprob for each in answer.logprobs])
    assert said.text_offset[0] == 0
    assert said.text_offset[-1] == sum(map(len, said.tokens[:-1]))
    for top, each in zip(said.top_logprobs, answer.logprobs, strict=True):
        assert len(top) in (1, 2, 3)
        assert max(top.values()) == pytest.approx(each.top[0][1])
    first, *rest = found.model_extra["prompt_logprobs"]
    assert first is None
    for listed, each in zip(rest, answer.prompt_logprobs, strict=True):
        assert listed[str(each.token)]["logprob"] == pytest.approx(each.logprob)
        assert listed[str(each.token)]["rank"] == each.rank
    offsets = [
        offset
        for event in http.completions.create(prompt=PROMPT, stream=True, **http_arguments())
        for choice in event.choices
        if choice.logprobs
        for offset in choice.logprobs.text_offset
    ]
    assert offsets == said.text_offset


def test_a_chat_has_logprobs_too(http):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
    found = http.chat.completions.create(logprobs=True, top_logprobs=3, **chat).choices[0]
    assert len(found.logprobs.content) == 4
    for each in found.logprobs.content:
        assert len(each.top_logprobs) == 3
        assert math.isclose(each.logprob, max(each.logprob, -1e9))
        assert each.top_logprobs[0].logprob >= each.logprob - 1e-6
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        http.chat.completions.create(top_logprobs=3, **chat)


def test_a_text_ends_an_answer_everywhere(client, channel, http):
    greedy = SamplingParams(temperature=0, max_tokens=12)
    text = client.generate(PROMPT, greedy).text
    stop = text[2:4]
    assert "\ufffd" not in stop
    until = text[: text.index(stop)]
    asked = SamplingParams(temperature=0, max_tokens=12, stop=stop)
    ended = client.generate(PROMPT, asked).completions[0]
    assert (ended.text, ended.stop_text, ended.finish_reason) == (until, stop, "stop")
    assert "".join(piece.text for piece in client.stream(PROMPT, asked)) == until
    sampling = vllm.SamplingParams(temperature=0, max_tokens=12, stop=[stop])
    request = vllm.GenerateRequest(text=PROMPT, sampling_params=sampling)
    (response,) = vllm_grpc.VllmEngineStub(channel).Generate(request, timeout=PATIENCE_S)
    assert response.complete.matched_stop_str == stop
    assert tuple(response.complete.output_ids) == ended.token_ids
    arguments = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    choice = http.completions.create(stop=stop, **arguments).choices[0]
    assert (choice.text, choice.finish_reason) == (until, "stop")
    body = {"include_stop_str_in_output": True}
    kept = http.completions.create(stop=[stop], extra_body=body, **arguments).choices[0]
    assert kept.text == until + stop
