"""`loongjax generate --server`: files answered by a running server."""

from __future__ import annotations

import asyncio
import json

import pytest

from loongjax.cli.main import main
from loongjax.errors import RequestError
from loongjax.offline.backend import LineFailedError
from loongjax.sampling.params import SamplingParams
from serving.client import Client, Piece, ServerError
from serving.offline.server_backend import ServerBackend

pytestmark = pytest.mark.xdist_group("server")


def test_a_server_says_what_it_says_to_its_clients(running, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": f"q{i}", "prompt": f"question {i}"} for i in range(20)]
    lines += [{"prompt": list(b"ids"), "n": 2, "seed": 3, "temperature": 1}, {"prompt": ""}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["generate", "--server", running.grpc, "--max-tokens", "5"]
    assert main([*command, "--input", str(source), "--output", str(target)]) == 3
    found = {told["line"]: told for told in map(json.loads, target.read_text().splitlines())}
    assert len(found) == 22
    assert found[22] == {"line": 22, "error": "the prompt is empty; give at least one token"}
    with Client(running.grpc) as client:
        for place, line in enumerate(lines[:20], start=1):
            answer = client.generate(line["prompt"], SamplingParams(temperature=0, max_tokens=5))
            assert found[place]["id"] == line["id"]
            assert found[place]["text"] == answer.text
            assert tuple(found[place]["token_ids"]) == answer.token_ids
            assert found[place]["prompt_tokens"] == answer.prompt_tokens
        params = SamplingParams(seed=3, n=2, max_tokens=5)
        both = client.generate(list(b"ids"), params).completions
        assert [each["text"] for each in found[21]["outputs"]] == [each.text for each in both]


def test_a_server_that_is_not_there_stops_the_job(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("serving.client.RetryPolicy", lambda attempts: None)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "x"}\n')
    command = ["generate", "--server", "127.0.0.1:1", "--input", str(source)]
    assert main([*command, "--output", str(target)]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err
    assert target.read_text() == ""


class Scripted:
    """A client whose calls go as told: a piece of an answer, or an error."""

    def __init__(self, *calls):
        self.calls = list(calls)

    async def stream(self, prompt, params):
        for event in self.calls.pop(0):
            if isinstance(event, ServerError):
                raise event
            yield event


def error(code: str, retry_after_s: float | None = None) -> ServerError:
    return ServerError("no", code=code, retry_after_s=retry_after_s)


BEGUN = Piece(index=0, text="a", token_ids=(1,))
ENDED = Piece(index=0, text="b", token_ids=(2,), finish_reason="length", prompt_tokens=3)
ABORTED = Piece(index=0, text="", token_ids=(), finish_reason="abort", prompt_tokens=3)


def answer(*calls):
    backend = ServerBackend(Scripted(*calls))
    return asyncio.run(backend.answer("x", SamplingParams())), backend.generated_tokens


@pytest.mark.parametrize(
    "first", [[error("RESOURCE_EXHAUSTED", 0.01)], [BEGUN, error("UNAVAILABLE")]]
)
def test_what_passes_is_tried_again(first):
    told, generated = answer(first, [BEGUN, ENDED])
    assert (told.prompt_tokens, told.completions[0].text) == (3, "ab")
    assert told.completions[0].token_ids == (1, 2)
    assert generated == sum(isinstance(event, Piece) for event in first) + 2


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ([error("INVALID_ARGUMENT")], RequestError, "^no$"),
        ([error("RESOURCE_EXHAUSTED")], RequestError, "^no$"),
        ([error("INTERNAL")], LineFailedError, "^no$"),
        ([BEGUN, ABORTED], LineFailedError, "aborted"),
        ([error("UNAVAILABLE")], ServerError, "UNAVAILABLE"),
        ([error("UNAUTHENTICATED")], ServerError, "UNAUTHENTICATED"),
    ],
)
def test_whose_fault_an_error_is(call, kind, message):
    with pytest.raises(kind, match=message):
        answer(call)
