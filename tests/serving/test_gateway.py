"""The Shepherd Model Gateway in front of a real server: OpenAI's HTTP to our gRPC."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

from tests.serving.server import PATIENCE_S

_SMG = shutil.which("smg") or shutil.which("smg", path=Path(sys.executable).parent)

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(_SMG is None, reason="the package smg is not installed"),
]

GREEDY = {"model": "tiny", "temperature": 0.0, "max_tokens": 8}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as it:
        return it.getsockname()[1]


@pytest.fixture(scope="module")
def gateway(running, model, tmp_path_factory):
    """Its URL, when it has found the server."""
    port, metrics = free_port(), free_port()
    log = tmp_path_factory.mktemp("gateway") / "log"
    command = [_SMG, "launch", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", f"grpc://{running.grpc}", "--tokenizer-path", str(model)]
    command += ["--prometheus-port", str(metrics), "--prometheus-host", "127.0.0.1"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_it_serves(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _wait_until_it_serves(process: subprocess.Popen, url: str, log: Path) -> None:
    """It lists a model some time before it has fetched the model's tokenizer."""
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def through(gateway):
    with openai.OpenAI(
        base_url=f"{gateway}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client


@pytest.fixture(scope="module")
def directly(running):
    with openai.OpenAI(
        base_url=f"{running.http}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        yield client


def test_the_gateway_lists_the_model(through):
    assert "tiny" in {model.id for model in through.models.list()}


def test_a_chat_through_the_gateway(through, directly):
    messages = [{"role": "user", "content": "hello"}]
    expected = directly.chat.completions.create(messages=messages, **GREEDY)
    found = through.chat.completions.create(messages=messages, **GREEDY)
    assert found.choices[0].message.content == expected.choices[0].message.content
    assert found.usage.completion_tokens == 8
    stream = through.chat.completions.create(messages=messages, stream=True, **GREEDY)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said == expected.choices[0].message.content


def test_a_completion_through_the_gateway(through, directly):
    expected = directly.completions.create(prompt="hello", **GREEDY)
    found = through.completions.create(prompt="hello", **GREEDY)
    # The gateway detokenizes; it leaves a character away that the last tokens do not complete.
    assert found.choices[0].text == expected.choices[0].text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_the_gateways_client_may_go(through, running):
    stream = through.completions.create(
        model="tiny", prompt="x", max_tokens=250, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    running.wait_until_idle()
