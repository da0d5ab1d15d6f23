"""`loongjax.v1.Inference` of a real server."""

from __future__ import annotations

import grpc
import pytest

from serving.stubs import inference_pb2 as pb
from serving.stubs import inference_pb2_grpc as pb_grpc
from tests.serving.server import PATIENCE_S

pytestmark = pytest.mark.xdist_group("server")


@pytest.fixture(scope="module")
def stub(channel):
    return pb_grpc.InferenceStub(channel)


def request(text="hello", **sampling) -> pb.GenerateRequest:
    params = pb.SamplingParams(**({"temperature": 0.0, "max_tokens": 5} | sampling))
    return pb.GenerateRequest(prompt=pb.Prompt(text=text), sampling=params)


def generate(stub, message, **call) -> list[pb.GenerateResponse]:
    return list(stub.Generate(message, timeout=PATIENCE_S, **call))


def ids_of(pieces: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    return [token for piece in pieces if piece.index == index for token in piece.token_ids]


def refusal(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_pieces_make_the_text_of_the_answer(stub):
    pieces = generate(stub, request(max_tokens=20))
    ids, text = ids_of(pieces), "".join(piece.text for piece in pieces)
    back = stub.Detokenize(pb.DetokenizeRequest(token_ids=ids), timeout=PATIENCE_S)
    assert text == back.text
    assert text
    *before, last = pieces
    assert not any(piece.HasField("finish") for piece in before)
    assert last.finish.reason == pb.FINISH_REASON_LENGTH
    assert (last.finish.prompt_tokens, last.finish.completion_tokens) == (5, 20)


def test_the_stop_token_is_no_part_of_the_text(stub):
    ids = ids_of(generate(stub, request(max_tokens=5)))
    pieces = generate(stub, request(stop_token_ids=[ids[2]]))
    stopped = ids[: ids.index(ids[2]) + 1]
    assert ids_of(pieces) == stopped
    text = stub.Detokenize(pb.DetokenizeRequest(token_ids=stopped[:-1])).text
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].finish.reason == pb.FINISH_REASON_STOP
    assert pieces[-1].finish.stop_token_id == ids[2]


def test_unset_values_mean_the_defaults(stub):
    """Two draws without a seed differ; two with one do not."""
    drawn = pb.GenerateRequest(prompt=pb.Prompt(text="a"), sampling={"max_tokens": 20})
    assert ids_of(generate(stub, drawn)) != ids_of(generate(stub, drawn))
    drawn.sampling.seed = 7
    assert ids_of(generate(stub, drawn)) == ids_of(generate(stub, drawn))


def test_several_answers(stub):
    pieces = generate(stub, request(n=3, temperature=1.0, seed=1))
    assert [len(ids_of(pieces, index)) for index in range(3)] == [5, 5, 5]
    assert sum(piece.HasField("finish") for piece in pieces) == 3


def test_a_batch_comes_in_the_order_of_its_ends(stub):
    long, short, wrong = request(max_tokens=120), request("hi", max_tokens=3), request("")
    batch = pb.GenerateBatchRequest(requests=[long, wrong, short, request(n=2)])
    found = list(stub.GenerateBatch(batch, timeout=PATIENCE_S))
    assert sorted((each.request, each.index) for each in found) == [
        (0, 0), (1, 0), (2, 0), (3, 0), (3, 1),
    ]  # fmt: skip
    assert found[-1].request == 0
    by_request = {each.request: each for each in found}
    assert by_request[1].finish.reason == pb.FINISH_REASON_ERROR
    assert "INVALID_ARGUMENT: the prompt is empty" in by_request[1].finish.error
    assert list(by_request[2].token_ids) == ids_of(generate(stub, short))
    assert len(by_request[0].token_ids) == by_request[0].finish.completion_tokens == 120


def test_a_batch_that_is_cancelled_frees_its_kv(stub, running):
    many = [request(max_tokens=250, ignore_eos=True) for _ in range(20)]
    call = stub.GenerateBatch(pb.GenerateBatchRequest(requests=[request(max_tokens=1), *many]))
    assert next(call).request == 0
    call.cancel()
    running.wait_until_idle()


def test_tokens_of_a_text(stub):
    text = pb.Prompt(text="hé")
    found = stub.Tokenize(pb.TokenizeRequest(prompt=text), timeout=PATIENCE_S)
    assert bytes(found.token_ids) == "hé".encode()


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "give its text, token_ids, or chat"),
        (request(temperature=-1.0), "INVALID_ARGUMENT", "temperature must be in"),
        (request(max_tokens=0), "INVALID_ARGUMENT", "max_tokens must be at least 1, not 0"),
        (request("x" * 300), "INVALID_ARGUMENT", "max_model_len 256"),
        (
            pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Chat())),
            "INVALID_ARGUMENT",
            "a chat needs at least one message",
        ),
        (
            pb.GenerateRequest(request_id="x" * 300, prompt=pb.Prompt(text="a")),
            "INVALID_ARGUMENT",
            "the request id has 300 characters; at most 256",
        ),
        (
            pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[9999]))),
            "INVALID_ARGUMENT",
            "token id 9999",
        ),
    ],
)
def test_refusals(stub, message, code, words):
    error = refusal(lambda: generate(stub, message))
    assert error.code().name == code
    assert words in error.details()


def test_names_are_told_back(stub):
    call = stub.Generate(request(), timeout=PATIENCE_S, metadata=[("x-request-id", "mine")])
    list(call)
    assert dict(call.trailing_metadata())["x-request-id-bin"] == b"mine"


def test_priority_in_metadata_must_be_a_number(stub):
    error = refusal(lambda: generate(stub, request(), metadata=[("x-priority", "1.5")]))
    assert "x-priority must be a whole number, not '1.5'" in error.details()
    assert generate(stub, request(), metadata=[("x-priority", "-3")])


def test_an_expired_deadline_frees_its_kv(stub, running):
    message = request(max_tokens=250, ignore_eos=True)
    error = refusal(lambda: list(stub.Generate(message, timeout=0.02)))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    running.wait_until_idle()


def test_a_closed_stream_frees_its_kv(stub, running):
    call = stub.Generate(request(max_tokens=250, ignore_eos=True))
    next(call)
    call.cancel()
    running.wait_until_idle()
