"""Messages that nobody should send: valid ones with changed bytes, wrong values, and noise."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from smg_grpc_proto import vllm_engine_pb2

from serving.stubs import inference_pb2

_VLLM = "/vllm.grpc.engine.VllmEngine"
_OURS = "/loongjax.v1.Inference"

# Neither what these say nor a change of their bytes may do more than generate a little.
_MESSAGES: Sequence[tuple[str, Any]] = (
    (
        f"{_VLLM}/Generate",
        vllm_engine_pb2.GenerateRequest(
            text="hello", stream=True, sampling_params={"max_tokens": 3, "temperature": 0.5}
        ),
    ),
    (f"{_VLLM}/Abort", vllm_engine_pb2.AbortRequest(request_ids=["a", "b"])),
    (f"{_VLLM}/Embed", vllm_engine_pb2.EmbedRequest()),
    (
        f"{_OURS}/Generate",
        inference_pb2.GenerateRequest(
            prompt={"token_ids": {"ids": [1, 2, 3]}}, sampling={"max_tokens": 3, "n": 2}
        ),
    ),
    (
        f"{_OURS}/GenerateBatch",
        inference_pb2.GenerateBatchRequest(
            requests=[{"prompt": {"text": "a"}, "sampling": {"max_tokens": 2}}] * 3
        ),
    ),
    (
        f"{_OURS}/Tokenize",
        inference_pb2.TokenizeRequest(
            prompt={"chat": {"messages": [{"role": "user", "content": "x"}]}}
        ),
    ),
    (f"{_OURS}/Detokenize", inference_pb2.DetokenizeRequest(token_ids=[1, 300, 2**32 - 1])),
    (f"{_OURS}/Absent", inference_pb2.TokenizeRequest()),
)

_BODIES: Sequence[tuple[str, dict[str, Any]]] = (
    ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "stream": True}),
    ("/v1/completions", {"model": "tiny", "prompt": ["a", [1, 2]], "max_tokens": 3}),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3},
    ),
    ("/tokenize", {"prompt": "a"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
)

_VALUES: Sequence[Any] = (
    None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"), "", "\ud800", "x" * 5000, [],
    [[]], {}, [None], {"a": {"b": []}}, "__import__('os')", "{{ 7 * 7 }}", "\x00",
)  # fmt: skip


def grpc_message(chance: random.Random) -> tuple[str, bytes]:
    """A method, and the bytes of a message for it."""
    method, message = chance.choice(_MESSAGES)
    data = bytearray(message.SerializeToString())
    if chance.random() < 0.1:
        return method, chance.randbytes(chance.randrange(200))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(3):
            case 0:
                data[at:at] = chance.randbytes(chance.randint(1, 4))
            case 1:
                del data[at : at + chance.randint(1, 4)]
            case 2:
                data[at : at + 1] = chance.randbytes(1)
    return method, bytes(data)


def http_body(chance: random.Random) -> tuple[str, bytes]:
    """A path, and a body for it."""
    path, body = chance.choice(_BODIES)
    changed = dict(body)
    for _ in range(chance.randint(1, 3)):
        key = chance.choice([*body, "n", "seed", "temperature", "stop", "stream_options", "x"])
        changed[key] = chance.choice(_VALUES)
    data = json.dumps(changed).encode()
    if chance.random() < 0.2:
        data = data[: chance.randrange(len(data))] + chance.randbytes(chance.randrange(20))
    return path, data


def http_noise(chance: random.Random) -> bytes:
    """Bytes that are hardly HTTP."""
    heads = (
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{",
    )
    return chance.choice(heads) + chance.randbytes(chance.randrange(50))
