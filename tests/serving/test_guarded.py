"""A server with certificates, tokens and tight limits."""

from __future__ import annotations

import json
import os
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loongjax.sampling.params import SamplingParams
from serving.client import Client, ClientTls, RetryPolicy, ServerError
from serving.stubs import cluster_pb2, cluster_pb2_grpc
from tests.serving.server import ENDLESS, PATIENCE_S, Server, server
from tests.serving.tls import make_certificates

pytestmark = pytest.mark.xdist_group("server")

ALICE, BOB, ROOT = "alice-" + "a" * 16, "bob-" + "b" * 16, "root-" + "r" * 16
LONG = SamplingParams(**ENDLESS)
SHORT = SamplingParams(temperature=0, max_tokens=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guards")
    make_certificates(folder)
    (folder / "tokens").write_text(f"alice {ALICE}\n")
    (folder / "cluster").write_text(f"root {ROOT}\n")
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def guarded(model, cache, files, log):
    options = [
        "--tls-cert", files / "server.pem", "--tls-key", files / "server.key",
        "--tls-client-ca", files / "ca.pem", "--token-file", files / "tokens",
        "--cluster-token-file", files / "cluster", "--max-requests", "2", "--max-queue", "1",
        "--max-prompt-tokens", "100", "--log-format", "json",
    ]  # fmt: skip
    with server(model, cache, *map(str, options), stderr=log) as it:
        yield it


@pytest.fixture(scope="module")
def tls(files):
    return ClientTls(ca=files / "ca.pem", cert=files / "client.pem", key=files / "client.key")


@pytest.fixture
def connect(guarded, tls):
    """Makes clients with a token, which are closed at the end."""
    clients = []

    def make(token: str | None) -> Client:
        retry = RetryPolicy(attempts=1)
        clients.append(Client(guarded.grpc, token=token, tls=tls, retry=retry))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def context(files):
    context = ssl.create_default_context(cafile=files / "ca.pem")
    context.load_cert_chain(files / "client.pem", files / "client.key")
    return context


def status_of(url: str, context: ssl.SSLContext, token: str | None = None) -> int:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, context=context, timeout=PATIENCE_S) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def code(call) -> str:
    with pytest.raises(ServerError) as caught:
        call()
    return caught.value.code


def test_a_known_token_is_let_in(connect):
    assert len(connect(ALICE).generate("hello", SHORT).token_ids) == 3


@pytest.mark.parametrize(
    ("token", "expected"),
    [(None, "UNAUTHENTICATED"), (BOB, "UNAUTHENTICATED"), (ROOT, "PERMISSION_DENIED")],
)
def test_others_are_not(connect, token, expected):
    client = connect(token)
    assert code(lambda: client.generate("hello", SHORT)) == expected
    assert code(lambda: client.tokenize("hello")) == expected


def test_the_cluster_has_tokens_of_its_own(guarded, tls):
    with grpc.secure_channel(guarded.grpc, tls.credentials()) as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)
        request = cluster_pb2.GetCostModelRequest()
        codes = {}
        for token in (ALICE, BOB, ROOT):
            try:
                stub.GetCostModel(request, metadata=[("authorization", f"Bearer {token}")])
                codes[token] = "OK"
            except grpc.RpcError as error:
                codes[token] = error.code().name
        assert codes == {ALICE: "PERMISSION_DENIED", BOB: "UNAUTHENTICATED", ROOT: "OK"}
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status


def test_http_asks_for_the_same(guarded, context):
    url = guarded.http
    assert url.startswith("https://")
    assert status_of(f"{url}/health", context) == 200
    assert status_of(f"{url}/v1/models", context) == 401
    assert status_of(f"{url}/v1/models", context, BOB) == 401
    assert status_of(f"{url}/v1/models", context, ROOT) == 403
    assert status_of(f"{url}/v1/models", context, ALICE) == 200


def test_a_client_needs_a_certificate(guarded, files):
    with Client(
        guarded.grpc,
        token=ALICE,
        tls=ClientTls(ca=files / "ca.pem"),
        retry=RetryPolicy(attempts=1),
    ) as client:
        assert code(lambda: client.generate("hello", SHORT, timeout_s=PATIENCE_S)) == "UNAVAILABLE"
    bare = ssl.create_default_context(cafile=files / "ca.pem")
    with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|eof|ssl"):
        status_of(f"{guarded.http}/health", bare)


def test_tokens_may_change_while_it_runs(connect, files):
    client = connect(BOB)
    assert code(lambda: client.tokenize("a")) == "UNAUTHENTICATED"
    (files / "tokens").write_text(f"alice {ALICE}\nbob {BOB}\n")
    os.utime(files / "tokens", (1, 1))
    time.sleep(1.1)
    assert client.tokenize("a") == (97,)


@contextmanager
def full(client: Client, guarded: Server, context: ssl.SSLContext) -> Iterator[None]:
    """Two requests in the engine, as many as it may have: one fills it, one has to wait."""
    guarded.wait_for("loongjax:open_requests", 0, context)
    first, second = (client.stream("a", LONG) for _ in range(2))
    next(first)
    thread = threading.Thread(target=next, args=(second,))
    thread.start()
    try:
        guarded.wait_for("loongjax:open_requests", 2, context)
        yield
    finally:
        first.close()
        thread.join(PATIENCE_S)
        second.close()


def test_a_prompt_has_a_limit(connect):
    said = "has 101 tokens, and max_prompt_tokens is 100"
    with pytest.raises(ServerError, match=said) as refused:
        connect(ALICE).generate("x" * 101, SHORT)
    assert refused.value.code == "INVALID_ARGUMENT"


def test_one_too_many_is_told_when_to_come_again(connect, guarded, context):
    client = connect(ALICE)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(client.generate("c", SHORT)))
    with full(client, guarded, context):
        waiting.start()
        guarded.wait_for("loongjax:gate_waiting_tokens", 1, context)
        with pytest.raises(ServerError, match="max_requests is 2, max_queue 1") as refused:
            client.generate("d", SHORT)
        assert (refused.value.code, refused.value.retry_after_s) == ("RESOURCE_EXHAUSTED", 1.0)
    waiting.join(PATIENCE_S)
    assert len(answers) == 1


def test_a_batch_waits_where_others_are_refused(connect, guarded, context):
    client = connect(ALICE)
    answers = []
    waiting = threading.Thread(target=lambda: answers.extend(client.batch(["c"] * 3, SHORT)))
    with full(client, guarded, context):
        waiting.start()
        guarded.wait_for("loongjax:gate_waiting_tokens", 1, context)
    waiting.join(PATIENCE_S)
    assert [answer.error for answer in answers] == [None] * 3


def test_the_log_is_json_and_names_requests_but_no_tokens(connect, log):
    connect(ALICE).generate("hello", SHORT, request_id='my "request"\n')
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        lines = [json.loads(line) for line in log.read_text().splitlines() if line[:1] == "{"]
        mine = [line for line in lines if line.get("request_id") == 'my "request"\n']
        if mine:
            break
        time.sleep(0.05)
    (line,) = mine
    assert (line["client"], line["protocol"], line["outcome"]) == ("alice", "grpc", "length")
    assert (line["prompt_tokens"], line["answer_tokens"]) == (5, 3)
    assert line["ttft_s"] > 0
    for token in (ALICE, BOB, ROOT):
        assert token not in log.read_text()
