"""What a server is started with, beside its engine. Checked when it is made."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from loongjax.errors import ConfigError

LogFormat: TypeAlias = Literal["text", "json"]

_LAST_PORT = 65_535
_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What clients may have open. Whatever is above gets RESOURCE_EXHAUSTED, or HTTP 429.

    Attributes:
      max_requests: Requests that the engine has at once. More give its policy more to choose
        from; fewer make turns between clients matter sooner.
      max_queue: Requests that wait for a turn. Memory of this process: their prompts.
      max_client_requests: Requests that one client has open; None: no limit of its own.
      max_prompt_tokens: Tokens of one prompt; None: what the engine takes. More is refused as
        INVALID_ARGUMENT, since no retry would help.
      max_waiting_tokens: Prompt tokens of the requests that wait; None: no limit.
      max_message_mib: Size of one message or body [MiB]. The thread that serves parses it: some
        25 ms a MiB, in which nobody else is served.
    """

    max_requests: int = 256
    max_queue: int = 1024
    max_client_requests: int | None = None
    max_prompt_tokens: int | None = None
    max_waiting_tokens: int | None = None
    max_message_mib: int = 256

    def __post_init__(self) -> None:
        if self.max_queue < 0:
            raise ConfigError(f"max_queue must not be negative, got {self.max_queue}")
        for name in (
            "max_requests",
            "max_client_requests",
            "max_prompt_tokens",
            "max_waiting_tokens",
            "max_message_mib",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.max_message_mib > 2047:
            raise ConfigError(f"max_message_mib must be at most 2047, not {self.max_message_mib}")

    @property
    def max_message_bytes(self) -> int:
        """Size of one message or body [bytes]."""
        return self.max_message_mib * _MIB


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """PEM files of the server's certificate and of those who may sign its clients'.

    Attributes:
      cert, key: The server's certificate chain and its key.
      client_ca: Clients need a certificate that one of these has signed; None: they need none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        for name in ("cert", "key", "client_ca"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ConfigError(f"tls {name}: there is no file {path}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """A server's addresses, guards and limits.

    Attributes:
      host: The address to listen on, an IP address or `localhost`.
      port: Of gRPC; 0 takes a free one.
      http_port: Of HTTP; 0 takes a free one; None: no HTTP.
      insecure: Whether whoever reaches an address beyond this machine may use the server.
      tls: Encryption of both; None: none.
      token_file: Who may generate (`serving.auth`); None: everybody.
      cluster_token_file: Who may steer and profile; None: everybody, or nobody where `token_file`
        is given.
      limits: What clients may have open.
      grace_s: How long open requests may go on after SIGTERM [s].
      profile_dir: Where profiles are written; None: nobody may ask for one.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int | None = None
    insecure: bool = False
    tls: TlsConfig | None = None
    token_file: Path | None = None
    cluster_token_file: Path | None = None
    limits: Limits = field(default_factory=Limits)
    grace_s: float = 30.0
    profile_dir: Path | None = None

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("http_port", self.http_port)):
            if port is not None and not 0 <= port <= _LAST_PORT:
                raise ConfigError(f"{name} must be in [0, {_LAST_PORT}], not {port}")
        if not 0.0 <= self.grace_s < float("inf"):
            raise ConfigError(f"grace_s must be a finite time of at least 0 s, not {self.grace_s}")
        if not self.insecure and not _is_loopback(self.host) and not self._asks_who:
            raise ConfigError(
                f"{self.host} can be reached from other machines, and this server asks nobody who "
                "they are; listen on 127.0.0.1, give --token-file or --tls-client-ca, or give "
                "--insecure"
            )

    @property
    def grpc_address(self) -> str:
        """`HOST:PORT`, an IPv6 host in brackets."""
        return join_address(self.host, self.port)

    @property
    def _asks_who(self) -> bool:
        has_client_ca = self.tls is not None and self.tls.client_ca is not None
        return self.token_file is not None or has_client_ca


def join_address(host: str, port: int) -> str:
    """`HOST:PORT`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(f"host must be an IP address or localhost, not {host!r}") from None
