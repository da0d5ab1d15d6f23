"""What is wrong with a server's files and addresses is told before it loads a model."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from loongjax.cli.main import main
from loongjax.errors import ConfigError
from serving.config import ServeConfig, TlsConfig
from serving.preflight import check
from tests.serving.tls import make_certificates


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("tls")
    make_certificates(found)
    return found


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_what_can_be_used_is_let_pass_and_left_free(folder):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    tls = TlsConfig(
        cert=folder / "server.pem", key=folder / "server.key", client_ca=folder / "ca.pem"
    )
    for _ in range(2):
        check(ServeConfig(port=port, http_port=0, tls=tls))


@pytest.mark.parametrize("which", ["port", "http_port"])
def test_a_port_in_use(taken, which):
    flag = f"--{which.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{taken}: Address already .*{flag}"):
        check(ServeConfig(**{"port": 0, which: taken}))


def test_both_ports_the_same():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ConfigError, match="another --http-port"):
        check(ServeConfig(port=port, http_port=port))


@pytest.mark.parametrize("field", ["cert", "key", "client_ca"])
def test_a_certificate_that_is_none(folder, tmp_path, field):
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN NOTHING-----\n")
    files = {"cert": folder / "server.pem", "key": folder / "server.key"} | {field: nonsense}
    with pytest.raises(ConfigError, match=r"nonsense\.pem.* cannot be used"):
        check(ServeConfig(port=0, tls=TlsConfig(**files)))


def test_the_command_looks_before_it_loads(taken, tmp_path, capsys):
    """The model does not even exist."""
    asked = ["serve", "--model", str(tmp_path / "none"), "--port", str(taken)]
    assert main(asked) == 2
    assert f"cannot listen on 127.0.0.1:{taken}" in capsys.readouterr().err
