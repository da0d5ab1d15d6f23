"""A real server process, and real clients of its gRPC side."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile

import grpc
import pytest
import tokenizers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2

from tests.serving.server import ENDLESS, PATIENCE_S, server

SERVICE = "vllm.grpc.engine.VllmEngine"


pytestmark = pytest.mark.xdist_group("server")


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


def test_ready_line(running):
    assert set(running.report) == {"ready", "grpc", "http", "startup_s", "programs"}
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
    error = refusal(stub, request(top_p=1.5))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "top_p must be in (0, 1], not 1.5" in error.details()
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
        lambda stub: next(
            stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), timeout=PATIENCE_S)
        ),
    ],
)
def test_what_cannot_apply_is_unimplemented(stub, call):
    with pytest.raises(grpc.RpcError) as caught:
        call(stub)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_tokenizer_is_given_away(stub):
    *chunks, last = stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=PATIENCE_S)
    data = b"".join(chunk.data for chunk in (*chunks, last))
    assert last.sha256 == hashlib.sha256(data).hexdigest()
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert set(archive.namelist()) == {"tokenizer.json", "tokenizer_config.json"}
    native = tokenizers.Tokenizer.from_str(archive.read("tokenizer.json").decode())
    assert native.encode("hé <300>").ids == list("hé <300>".encode())
    assert native.decode([104, 105, 300]) == "hi<300>"


def test_a_profile_is_written_where_the_server_was_told(stub, profiles):
    with pytest.raises(grpc.RpcError, match="output_dir is not supported"):
        stub.StartProfile(common_pb2.StartProfileRequest(output_dir="/tmp"), timeout=PATIENCE_S)
    with pytest.raises(grpc.RpcError, match="no profile is being recorded"):
        stub.StopProfile(common_pb2.StopProfileRequest(), timeout=PATIENCE_S)
    assert stub.StartProfile(common_pb2.StartProfileRequest(), timeout=PATIENCE_S).success
    with pytest.raises(grpc.RpcError, match="stop it first"):
        stub.StartProfile(common_pb2.StartProfileRequest(), timeout=PATIENCE_S)
    generate(stub, request())
    assert stub.StopProfile(common_pb2.StopProfileRequest(), timeout=PATIENCE_S).success
    assert list(profiles.rglob("*.xplane.pb"))


def test_abort_ends_a_request_with_its_reason(stub, running):
    call = stub.Generate(request(request_id="long", **ENDLESS))
    next(call)
    error = refusal(stub, request(request_id="long"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "'long'" in error.details()
    for _ in range(2):
        stub.Abort(pb.AbortRequest(request_ids=["long", "nobody"]), timeout=PATIENCE_S)
    *_, last = call
    assert last.complete.finish_reason == "abort"
    running.wait_until_idle()


def test_a_dropped_stream_frees_its_kv(stub, running):
    call = stub.Generate(request(max_tokens=250, ignore_eos=True))
    next(call)
    call.cancel()
    running.wait_until_idle()


def test_an_expired_deadline_frees_its_kv(stub, running):
    call = stub.Generate(request(max_tokens=250, ignore_eos=True), timeout=0.02)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    running.wait_until_idle()


def test_it_tells_what_it_is(stub):
    model = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE_S)
    assert (model.served_model_name, model.max_context_length) == ("tiny", 256)
    assert stub.GetServerInfo(pb.GetServerInfoRequest()).server_type == "loongjax"
    assert stub.GetLoads(pb.GetLoadsRequest()).version.startswith("loongjax ")
    assert stub.HealthCheck(pb.HealthCheckRequest()).healthy


def test_reflection_lists_and_describes(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    ours = {SERVICE, "loongjax.v1.Inference", "loongjax.v1.Cluster", "grpc.health.v1.Health"}
    assert ours <= set(database.get_services())
    assert database.FindFileContainingSymbol(SERVICE).package == "vllm.grpc.engine"


def test_sigterm_drains(model, cache):
    """Open requests end, new ones are refused, readiness goes first, and the exit code is 0."""
    grace = ("--grace-s", str(PATIENCE_S))
    with server(model, cache, *grace) as it, grpc.insecure_channel(it.grpc) as channel:
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
