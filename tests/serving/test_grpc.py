"""A real server process, and real clients of its gRPC side."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc

from tests.serving.server import Server, server

PATIENCE_S = 60.0
SERVICE = "vllm.grpc.engine.VllmEngine"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs of all servers of this module."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def running(cache):
    with server(cache) as it:
        yield it


@pytest.fixture(scope="module")
def channel(running: Server):
    with grpc.insecure_channel(running.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel):
    return pb_grpc.VllmEngineStub(channel)


def request(stream: bool = True, request_id: str = "", **sampling) -> pb.GenerateRequest:
    params = pb.SamplingParams(**({"temperature": 0.0, "max_tokens": 5} | sampling))
    return pb.GenerateRequest(
        request_id=request_id, text="hello", stream=stream, sampling_params=params
    )


def generate(stub, message: pb.GenerateRequest, **call) -> list[pb.GenerateResponse]:
    return list(stub.Generate(message, timeout=PATIENCE_S, **call))


def refusal(stub, message: pb.GenerateRequest, **call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        generate(stub, message, **call)
    return caught.value


def wait_until_idle(stub) -> None:
    """Until no request is open, and no slot of the pool in use."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        (load,) = stub.GetLoads(pb.GetLoadsRequest(), timeout=PATIENCE_S).loads
        info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S)
        if load.num_used_tokens == load.num_total_reqs == info.active_requests == 0:
            return
        time.sleep(0.05)
    raise AssertionError(f"still busy: {load}, {info.active_requests} requests")


def test_ready_line(running):
    assert set(running.report) == {"ready", "grpc", "startup_s", "programs"}
    assert running.report["ready"] is True


def test_stream_and_whole_answer_are_alike(stub):
    *chunks, last = generate(stub, request())
    (whole,) = generate(stub, request(stream=False))
    assert last == whole
    ids = [token for response in chunks for token in response.chunk.token_ids]
    assert ids == list(whole.complete.output_ids)
    assert [response.chunk.completion_tokens for response in chunks][-1] == 5
    assert (whole.complete.prompt_tokens, whole.complete.completion_tokens) == (5, 5)
    assert whole.complete.finish_reason == "length"
    assert whole.complete.WhichOneof("matched_stop") is None


def test_text_and_ids_are_alike(stub):
    ids = request(stream=False)
    ids.tokenized.input_ids.extend(b"hello")
    assert generate(stub, ids) == generate(stub, request(stream=False))


def test_a_stop_token_is_told(stub):
    (whole,) = generate(stub, request(stream=False))
    stop = whole.complete.output_ids[1]
    (stopped,) = generate(stub, request(stream=False, stop_token_ids=[stop]))
    assert stopped.complete.finish_reason == "stop"
    assert stopped.complete.matched_token_id == stop == stopped.complete.output_ids[-1]


def test_several_answers(stub):
    params = {"temperature": 1.0, "seed": 3}
    three = generate(stub, request(stream=False, n=3, **params))
    answers = {response.complete.index: response.complete for response in three}
    assert sorted(answers) == [0, 1, 2]
    (one,) = generate(stub, request(stream=False, **params))
    assert answers[0].output_ids == one.complete.output_ids


def test_refusals_name_the_field(stub):
    error = refusal(stub, request(top_p=0.5))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "sampling_params.top_p" in error.details()
    error = refusal(stub, request(max_tokens=300))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "max_model_len 256" in error.details()
    assert refusal(stub, request(regex="a")).code() is grpc.StatusCode.UNIMPLEMENTED
    error = refusal(stub, request(), metadata=[("x-priority", "high")])
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "x-priority" in error.details()


@pytest.mark.parametrize(
    "call",
    [
        lambda stub: stub.Embed(pb.EmbedRequest(), timeout=PATIENCE_S),
    ],
)
def test_what_cannot_apply_is_unimplemented(stub, call):
    with pytest.raises(grpc.RpcError) as caught:
        call(stub)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_abort_ends_a_request_with_its_reason(stub):
    call = stub.Generate(request(request_id="long", max_tokens=250, ignore_eos=True))
    next(call)
    error = refusal(stub, request(request_id="long"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "'long'" in error.details()
    for _ in range(2):
        stub.Abort(pb.AbortRequest(request_ids=["long", "nobody"]), timeout=PATIENCE_S)
    *_, last = call
    assert last.complete.finish_reason in ("abort", "length")
    wait_until_idle(stub)


def test_a_dropped_stream_frees_its_kv(stub):
    call = stub.Generate(request(max_tokens=250, ignore_eos=True))
    next(call)
    call.cancel()
    wait_until_idle(stub)


def test_an_expired_deadline_frees_its_kv(stub):
    call = stub.Generate(request(max_tokens=250, ignore_eos=True), timeout=0.02)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until_idle(stub)


def test_it_tells_what_it_is(stub):
    model = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE_S)
    assert (model.served_model_name, model.max_context_length) == ("random:tiny", 256)
    assert stub.GetServerInfo(pb.GetServerInfoRequest()).server_type == "loongjax"
    assert stub.GetLoads(pb.GetLoadsRequest()).version.startswith("loongjax ")
    assert stub.HealthCheck(pb.HealthCheckRequest()).healthy


def test_reflection_lists_and_describes(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
    assert database.FindFileContainingSymbol(SERVICE).package == "vllm.grpc.engine"


def test_sigterm_drains(cache):
    """Open requests end, new ones are refused, readiness goes first, and the exit code is 0."""
    with server(cache) as it, grpc.insecure_channel(it.grpc) as channel:
        stub, health = pb_grpc.VllmEngineStub(channel), health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(watch).status == HealthCheckResponse.SERVING
        calls = [stub.Generate(request(max_tokens=250, ignore_eos=True)) for _ in range(8)]
        for call in calls:
            next(call)
        codes: list[int] = []
        end = threading.Thread(target=lambda: codes.append(it.terminate()))
        end.start()
        assert next(watch).status == HealthCheckResponse.NOT_SERVING
        watch.cancel()
        assert refusal(stub, request()).code() is grpc.StatusCode.UNAVAILABLE
        for call in calls:
            *_, last = call
            assert last.complete.completion_tokens == 250
        end.join()
    assert codes == [0]
