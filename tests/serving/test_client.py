"""`serving.client`, in both forms, against a real server."""

from __future__ import annotations

import asyncio
from concurrent import futures
from contextlib import aclosing
from dataclasses import fields

import grpc
import pytest

from loongjax.errors import ConfigError, RequestError
from loongjax.sampling.params import SamplingParams
from serving.client import AsyncClient, Client, ClientTls, RetryPolicy, ServerError
from serving.client.messages import to_request
from serving.grpc.inference import to_params
from serving.stubs import inference_pb2 as pb
from serving.stubs import inference_pb2_grpc as pb_grpc

pytestmark = pytest.mark.xdist_group("server")

SHORT = SamplingParams(temperature=0, max_tokens=6)
LONG = SamplingParams(max_tokens=250, ignore_eos=True)


@pytest.fixture(scope="module")
def client(running):
    with Client(running.grpc) as client:
        yield client


def test_whole_and_in_pieces(client):
    answer = client.generate("hello", SHORT)
    pieces = list(client.stream("hello", SHORT))
    assert sum((piece.token_ids for piece in pieces), ()) == answer.token_ids
    assert "".join(piece.text for piece in pieces) == answer.text
    assert (answer.prompt_tokens, len(answer.token_ids)) == (5, 6)
    assert answer.completions[0].finish_reason == "length"
    assert client.generate(list(b"hello"), SHORT) == answer


def test_both_clients_say_the_same(client, running):
    async def main():
        async with AsyncClient(running.grpc) as other:
            answers = await asyncio.gather(*(other.generate(f"q{i}", SHORT) for i in range(4)))
            batch = [each async for each in other.batch(["q0", ""], SHORT)]
            tokens = await other.tokenize("hé")
            return answers, batch, tokens, await other.detokenize(tokens)

    answers, batch, tokens, text = asyncio.run(main())
    assert answers == [client.generate(f"q{i}", SHORT) for i in range(4)]
    assert (tokens, text) == (tuple("hé".encode()), "hé")
    (wrong,) = [each for each in batch if each.error]
    (right,) = [each for each in batch if each.completion]
    assert (wrong.request, right.request) == (1, 0)
    assert "the prompt is empty" in wrong.error
    assert right.completion.token_ids == answers[0].token_ids
    assert client.detokenize(client.tokenize("hé")) == "hé"


def test_a_batch_has_params_for_each(client):
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (2, 4)]
    lengths = {
        each.request: len(each.completion.token_ids) for each in client.batch(["a", "b"], params)
    }
    assert lengths == {0: 2, 1: 4}
    with pytest.raises(RequestError, match="got 2 sampling params for 1 prompts"):
        list(client.batch(["a"], params))


def test_a_chat(client):
    chat = [{"role": "user", "content": "hello"}]
    answer = client.generate(chat, SHORT)
    assert answer == client.generate("user: hello\nassistant:", SHORT)


def test_leaving_a_stream_frees_the_kv(client, running):
    for _ in client.stream("a", LONG):
        break
    running.wait_until_idle()

    async def main():
        async with AsyncClient(running.grpc) as other:
            async with aclosing(other.stream("a", LONG)) as pieces:
                async for _ in pieces:
                    break
            await asyncio.to_thread(running.wait_until_idle)
            task = asyncio.create_task(other.generate("a", LONG))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(running.wait_until_idle)

    asyncio.run(main())


def test_errors_say_what_the_server_said(client):
    with pytest.raises(ServerError, match="INVALID_ARGUMENT: the prompt is empty") as caught:
        client.generate("")
    assert (caught.value.code, caught.value.retry_after_s) == ("INVALID_ARGUMENT", None)
    with pytest.raises(ServerError, match="DEADLINE_EXCEEDED"):
        client.generate("a", LONG, timeout_s=0.01)


def test_every_parameter_is_sent():
    """A field that `SamplingParams` gets must not be dropped in silence here."""
    asked = SamplingParams(
        temperature=0.5,
        top_k=4,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={7: 1.5},
        n=2,
        seed=3,
        max_tokens=4,
        min_tokens=1,
        stop="end",
        stop_token_ids=(5,),
        include_stop_str_in_output=True,
        ignore_eos=True,
        logprobs=2,
        prompt_logprobs=1,
    )
    assert all(getattr(asked, each.name) != each.default for each in fields(asked))
    assert to_params(to_request("a", asked).sampling) == asked


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([-1], "token ids are in"), ([{"role": "user"}], "a message has a role and a content")],
)
def test_prompts_that_cannot_be_sent(prompt, message):
    with pytest.raises(RequestError, match=message):
        to_request(prompt, None)


def test_half_a_pair_of_files(tmp_path):
    with pytest.raises(ConfigError, match="belong together"):
        ClientTls(cert=tmp_path / "a").credentials()
    with pytest.raises(ConfigError, match="cannot be read"):
        ClientTls(ca=tmp_path / "a").credentials()
    with pytest.raises(ConfigError, match="attempts must be at least 1, not 0"):
        RetryPolicy(attempts=0)


class Flaky(pb_grpc.InferenceServicer):
    """Fails with a code so many times, before or after it has said something."""

    def __init__(self) -> None:
        self.calls = 0
        self.failures = 0
        self.code = grpc.StatusCode.UNAVAILABLE
        self.says_first = False

    def Generate(self, request, context):
        self.calls += 1
        if self.says_first:
            yield pb.GenerateResponse(token_ids=[1])
        if self.calls <= self.failures:
            context.abort(self.code, "not now")
        yield pb.GenerateResponse(
            token_ids=[2], finish=pb.Finish(reason=pb.FINISH_REASON_STOP, prompt_tokens=1)
        )


@pytest.fixture
def flaky():
    servicer = Flaky()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_InferenceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None)


@pytest.mark.parametrize(
    ("failures", "says_first", "code", "calls"),
    [
        (0, False, None, 1),
        (2, False, None, 3),
        (9, False, "UNAVAILABLE", 3),
        (1, True, "UNAVAILABLE", 1),  # what was said cannot be taken back
    ],
)
def test_what_is_tried_again(flaky, failures, says_first, code, calls):
    flaky.failures, flaky.says_first = failures, says_first
    retry = RetryPolicy(attempts=3, first_s=0.01)

    def ask():
        with Client(flaky.address, retry=retry) as client:
            return client.generate("a").token_ids

    async def ask_async():
        async with AsyncClient(flaky.address, retry=retry) as client:
            return (await client.generate("a")).token_ids

    for run in (ask, lambda: asyncio.run(ask_async())):
        flaky.calls = 0
        if code is None:
            assert run() == (2,)
        else:
            with pytest.raises(ServerError, match="not now") as caught:
                run()
            assert caught.value.code == code
        assert flaky.calls == calls
