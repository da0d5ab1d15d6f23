"""The HTTP side of a real server; OpenAI's own client talks to it."""

from __future__ import annotations

import http.client
import json
import re

import openai
import pytest

from serving.stubs import inference_pb2_grpc
from tests.serving.documents import section
from tests.serving.server import PATIENCE_S
from tests.serving.test_inference import generate, ids_of, request

pytestmark = pytest.mark.xdist_group("server")

GREEDY = {"model": "tiny", "temperature": 0.0, "max_tokens": 8}
LONG = {"model": "tiny", "prompt": "x", "max_tokens": 250, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(
        base_url=f"{running.http}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client


@pytest.fixture(scope="module")
def expected(channel) -> str:
    """What the model says to `hello` in eight tokens, over gRPC."""
    stub = inference_pb2_grpc.InferenceStub(channel)
    return "".join(piece.text for piece in generate(stub, request(max_tokens=8)))


def ask(running, method: str, path: str, body=None, headers=None):
    """Status, headers and body of an answer."""
    address = running.http.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        head = {"content-type": "application/json"} | (headers or {})
        connection.request(method, path, data, head)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def error_of(running, path: str, body, status: int = 400) -> dict:
    found, _, data = ask(running, "POST", path, body)
    assert found == status, data
    return json.loads(data)["error"]


def test_a_completion_says_what_grpc_says(client, expected):
    found = client.completions.create(prompt="hello", **GREEDY)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason) == (expected, "length")
    assert found.model == "tiny"
    assert found.object == "text_completion"
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 8, 13)


def test_a_stream_says_the_same(client, expected):
    options = {"include_usage": True}
    stream = client.completions.create(
        prompt="hello", stream=True, stream_options=options, **GREEDY
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage.total_tokens) == ([], 13)
    assert len({chunk.id for chunk in chunks}) == 1


def test_prompts_may_be_ids_and_many(client, expected):
    ids = list(b"hello")
    assert client.completions.create(prompt=ids, **GREEDY).choices[0].text == expected
    found = client.completions.create(prompt=["hi", "hello"], n=2, **GREEDY)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text == expected for choice in found.choices] == [False, False, True, True]
    assert found.usage.prompt_tokens == 7
    assert found.usage.completion_tokens == 32
    texts = ["", ""]
    for chunk in client.completions.create(prompt=[[104, 105], ids], stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [found.choices[0].text, expected]


def test_the_same_seed_says_the_same(client):
    def draw(**more):
        body = GREEDY | {"temperature": 1.0} | more
        return client.completions.create(prompt="hello", **body).choices[0].text

    assert draw(seed=5) == draw(seed=5)
    assert draw() != draw()


def test_a_chat_is_written_by_the_models_template(client):
    messages = [{"role": "user", "content": "hello"}]
    found = client.chat.completions.create(messages=messages, **GREEDY)
    prompt = "user: hello\nassistant:"
    said = client.completions.create(prompt=prompt, **GREEDY).choices[0].text
    assert found.choices[0].message.content == said
    assert found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == len(prompt)
    body = GREEDY | {"max_tokens": None, "max_completion_tokens": 8}
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    chunks = list(client.chat.completions.create(messages=parts, stream=True, n=2, **body))
    for index in range(2):
        deltas = [c.choices[0].delta for c in chunks if c.choices[0].index == index]
        assert "".join(delta.content for delta in deltas) == said
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)


def test_a_stop_token_ends_an_answer(client, channel):
    stub = inference_pb2_grpc.InferenceStub(channel)
    ids = ids_of(generate(stub, request(max_tokens=8)))
    body = {"stop_token_ids": [ids[3]]}
    found = client.completions.create(prompt="hello", extra_body=body, **GREEDY)
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == ids.index(ids[3]) + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", [""]),
        ("top_p", 0),
        ("logit_bias", {"a": 1.0}),
        ("frequency_penalty", 2.5),
        ("logprobs", 21),
        ("echo", True),
        ("best_of", 2),
        ("temperature", -1.0),
        ("temperature", "hot"),
        ("n", 0),
        ("max_tokens", 0),
        ("seed", -1),
        ("invented", 1),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(running, field, value):
    error = error_of(running, "/v1/completions", GREEDY | {"prompt": "a", field: value})
    assert (error["param"], error["code"]) == (field, "invalid_argument")
    assert field in error["message"]


@pytest.mark.parametrize("field", ["response_format", "tools", "tool_choice", "store"])
def test_so_it_is_for_chats(running, field):
    values = {"response_format": {"type": "json_object"}, "tools": [{}], "tool_choice": "auto"}
    chat = GREEDY | {"messages": [{"role": "user", "content": "a"}], field: values.get(field, True)}
    assert error_of(running, "/v1/chat/completions", chat)["param"] == field


def test_values_that_ask_for_nothing_are_taken(client):
    neutral = {"top_p": 1, "frequency_penalty": 0, "stop": [], "logit_bias": {}, "user": "me"}
    assert client.completions.create(prompt="a", **neutral, **GREEDY).choices


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": "x" * 300}, 400, "max_model_len 256"),
        ({"prompt": [600]}, 400, "token id 600"),
        ({"prompt": [600, "a"]}, 400, "prompt"),
        ({}, 400, "prompt is missing"),
        ({"prompt": "a", "model": "other"}, 404, "model 'other' is not served here"),
        ({"prompt": "a", "stream_options": {}}, 400, "stream_options needs stream: true"),
        ({"prompt": "x" * 300, "stream": True}, 400, "max_model_len 256"),
    ],
)
def test_errors_have_a_status_and_say_why(running, body, status, words):
    assert words in error_of(running, "/v1/completions", GREEDY | body, status)["message"]


def test_bodies_that_are_no_json(running):
    assert "the body is not what" in error_of(running, "/v1/completions", b"{")["message"]
    assert error_of(running, "/v1/nowhere", {}, 404)["code"] == "not_found"
    assert ask(running, "GET", "/v1/completions")[0] == 405


def test_a_body_may_not_be_too_long(running):
    """The limit of the test server is 1 MiB."""
    body = b" " * 2**20 + b"{}"
    assert error_of(running, "/tokenize", body, 413)["code"] == "resource_exhausted"
    address = running.http.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    chunks = (b" " * 2**16 for _ in range(17))
    connection.request("POST", "/tokenize", chunks, {"content-type": "application/json"})
    assert connection.getresponse().status == 413
    connection.close()


def test_text_to_tokens_and_back(running):
    _, _, data = ask(running, "POST", "/tokenize", {"prompt": "hé"})
    assert json.loads(data) == {"count": 3, "max_model_len": 256, "tokens": list("hé".encode())}
    messages = [{"role": "user", "content": "a"}]
    _, _, data = ask(running, "POST", "/tokenize", {"messages": messages})
    assert bytes(json.loads(data)["tokens"]) == b"user: a\nassistant:"
    _, _, data = ask(running, "POST", "/detokenize", {"tokens": list("hé".encode())})
    assert json.loads(data) == {"prompt": "hé"}
    assert "not both" in error_of(running, "/tokenize", {})["message"]


def test_what_is_served(client):
    (model,) = client.models.list()
    assert (model.id, model.owned_by, model.max_model_len) == ("tiny", "loongjax", 256)


def test_health_and_names(running):
    assert ask(running, "GET", "/health")[0] == ask(running, "GET", "/ready")[0] == 200
    body = GREEDY | {"prompt": "a"}
    _, headers, data = ask(running, "POST", "/v1/completions", body, {"x-request-id": "mine"})
    assert headers["x-request-id"] == json.loads(data)["id"] == "mine"
    assert ask(running, "POST", "/v1/completions", body, {"x-priority": "high"})[0] == 400
    assert ask(running, "POST", "/v1/completions", body, {"x-request-id": "x" * 300})[0] == 400


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_kv(running, stream):
    address = running.http.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=PATIENCE_S)
    body = json.dumps(LONG | {"stream": stream})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    if stream:
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
    connection.close()
    running.wait_until_idle()


def test_metrics_have_vllms_names_and_ours(running, client):
    client.completions.create(prompt="hello", **GREEDY)
    status, headers, data = ask(running, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in data.decode().splitlines() if line[0] != "#")
    model = 'model_name="tiny"'
    assert float(lines[f"vllm:generation_tokens_total{{{model}}}"]) >= 8
    assert float(lines[f"vllm:num_requests_running{{{model}}}"]) == 0
    assert float(lines[f'vllm:request_success_total{{finished_reason="length",{model}}}']) >= 1
    for name in (
        "time_to_first_token_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert float(lines[f"vllm:{name}_count{{{model}}}"]) >= 1, name
    for name in (
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "loongjax:scale_ups_total",
        "loongjax:migrated_tokens_total",
        "loongjax:compiles_after_warm_up_total",
    ):
        assert f"{name}{{{model}}}" in lines, name
    assert float(lines[f'loongjax:steps_total{{degree="1",kind="decode",{model}}}']) > 0
    assert float(lines[f'loongjax:host_seconds_total{{{model},phase="planning"}}']) > 0
    documented = section("serve")
    for name in re.findall(r"^# TYPE \w+:(\w+)", data.decode(), re.M):
        assert name.endswith("_created") or name in documented, name
