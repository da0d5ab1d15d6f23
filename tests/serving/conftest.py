"""One server for all tests that need nothing special of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from loongjax.bench.checkpoint import export_random
from loongjax.text.byte_vocabulary import byte_tokenizer
from loongjax.text.chat_template import ChatTemplate
from loongjax.text.export import tokenizer_files
from tests.serving.server import Server, server


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs of all servers."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server puts profiles."""
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that reads bytes and can chat."""
    folder = tmp_path_factory.mktemp("model")
    export_random("tiny", folder)
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
        variables={},
        origin="tests",
    )
    tokenizer = replace(byte_tokenizer(), chat_template=template)
    for name, content in tokenizer_files(tokenizer, 512).items():
        (folder / name).write_text(content)
    return folder


@pytest.fixture(scope="session")
def running(model: Path, cache: Path, profiles: Path) -> Iterator[Server]:
    """A server with two instances."""
    options = ("--profile-dir", str(profiles), "--max-message-mib", "1")
    with server(model, cache, *options) as it:
        yield it


@pytest.fixture(scope="session")
def channel(running: Server) -> Iterator[grpc.Channel]:
    """A connection to it."""
    with grpc.insecure_channel(running.grpc) as channel:
        yield channel
