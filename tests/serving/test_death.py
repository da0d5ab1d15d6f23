"""An engine that dies takes its server with it, and everybody is told."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from loongjax.sampling.params import SamplingParams
from serving.client import Client, RetryPolicy, ServerError
from tests.serving.breaking_server import DEADLY
from tests.serving.server import ENDLESS, PATIENCE_S, server

pytestmark = pytest.mark.xdist_group("server")

LONG = SamplingParams(**ENDLESS)
SERVICE = health_pb2.HealthCheckRequest(service="loongjax.v1.Inference")


def test_the_engine_dies(model, cache):
    program = ("-m", "tests.serving.breaking_server")
    with (
        server(model, cache, program=program) as it,
        grpc.insecure_channel(it.grpc) as channel,
        Client(it.grpc, retry=RetryPolicy(attempts=1)) as client,
        _stream_http(it.http) as events,
    ):
        codes: list[str] = []

        def wait() -> None:
            try:
                client.generate("a", LONG)
            except ServerError as error:
                codes.append(error.code)

        watch = health_pb2_grpc.HealthStub(channel).Watch(SERVICE, timeout=PATIENCE_S)
        assert next(watch).status == HealthCheckResponse.SERVING
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        it.wait_for("loongjax:open_requests", 4)
        with pytest.raises(ServerError, match="somebody asked for 13 tokens") as deadly:
            client.generate("b", SamplingParams(max_tokens=DEADLY))
        assert deadly.value.code == "UNAVAILABLE"
        assert next(watch).status == HealthCheckResponse.NOT_SERVING
        for thread in threads:
            thread.join(PATIENCE_S)
        assert codes == ["UNAVAILABLE"] * 3
        *_, error, done, _ = events.read().decode().split("\n\n")
        assert "somebody asked for 13 tokens" in error
        assert done == "data: [DONE]"
        assert it.process.wait(PATIENCE_S) == 1


def test_a_second_signal_cuts_off_and_the_next_start_compiles_nothing(model, cache, running):
    """Whoever is cut off is told."""
    codes: list[int] = []
    with server(model, cache, "--grace-s", str(PATIENCE_S)) as it:
        with (
            grpc.insecure_channel(it.grpc) as channel,
            Client(it.grpc, retry=RetryPolicy(attempts=1)) as client,
        ):
            watch = health_pb2_grpc.HealthStub(channel).Watch(SERVICE, timeout=PATIENCE_S)
            assert next(watch).status == HealthCheckResponse.SERVING
            stream = client.stream("a", LONG)
            next(stream)
            it.process.terminate()
            assert next(watch).status == HealthCheckResponse.NOT_SERVING
            ended = threading.Thread(target=lambda: codes.append(it.terminate()))
            ended.start()
            with pytest.raises(ServerError) as caught:
                for _ in stream:
                    pass
            assert caught.value.code == "UNAVAILABLE"
            ended.join(PATIENCE_S)
        assert codes == [0]
        with pytest.raises(ServerError) as caught, Client(it.grpc) as client:
            client.generate("a", timeout_s=2.0)
        assert caught.value.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert it.report["programs"]["compiled"] == 0  # from the library


@contextmanager
def _stream_http(url: str) -> Iterator[http.client.HTTPResponse]:
    """A stream that has begun."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE_S)
    body = json.dumps({"model": "tiny", "prompt": "a", "stream": True} | ENDLESS)
    with closing(connection):
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        with connection.getresponse() as response:
            yield response
