"""What a server is started with, beside its engine. Checked when it is made."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from loongjax.errors import ConfigError

_LAST_PORT = 65_535


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """A server's addresses and limits.

    Attributes:
      host: The address to listen on, an IP address or `localhost`.
      port: Of gRPC; 0 takes a free one.
      insecure: Whether whoever reaches an address beyond this machine may use the server.
      max_requests: Requests open at once, those that wait included; each further one is
        refused. Memory of this process: its prompt and its answers.
      grace_s: How long open requests may go on after SIGTERM [s].
    """

    host: str = "127.0.0.1"
    port: int = 50051
    insecure: bool = False
    max_requests: int = 1024
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= _LAST_PORT:
            raise ConfigError(f"port must be in [0, {_LAST_PORT}], not {self.port}")
        if self.max_requests < 1:
            raise ConfigError(f"max_requests must be at least 1, not {self.max_requests}")
        if not 0.0 <= self.grace_s < float("inf"):
            raise ConfigError(f"grace_s must be a finite time of at least 0 s, not {self.grace_s}")
        if not self.insecure and not _is_loopback(self.host):
            raise ConfigError(
                f"{self.host} can be reached from other machines, and this server asks nobody who "
                "they are; listen on 127.0.0.1, or give --insecure"
            )

    @property
    def grpc_address(self) -> str:
        """`HOST:PORT`, an IPv6 host in brackets."""
        return join_address(self.host, self.port)


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
