"""What can be wrong with a server's files and addresses, found before a model is loaded.

A first start compiles for minutes: whoever mistyped a path is not to wait for that.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import ExitStack

from loongjax.errors import ConfigError
from serving.auth import Guard
from serving.config import ServeConfig, TlsConfig, join_address


def check(config: ServeConfig) -> None:
    """Reads the files of a server, and takes its addresses for a moment.

    Raises:
      ConfigError: A token file or a certificate cannot be used, or an address cannot be had.
    """
    Guard.of_files(config.token_file, config.cluster_token_file)
    if config.tls is not None:
        _check_certificates(config.tls)
    with ExitStack() as taken:
        for flag, port in (("--port", config.port), ("--http-port", config.http_port)):
            if port:  # else any free one, or none
                taken.enter_context(listen(config.host, port, flag))


def listen(host: str, port: int, flag: str, backlog: int = 1) -> socket.socket:
    """A socket that listens there; `flag` is who chose the port.

    Raises:
      ConfigError: The address is in use, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {join_address(host, port)}: {error.strerror or error}; choose "
            f"another {flag} or --host"
        ) from error


def _check_certificates(tls: TlsConfig) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{tls.cert} with the key {tls.key} cannot be used: {error}") from error
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{tls.client_ca} cannot be used: {error}") from error
