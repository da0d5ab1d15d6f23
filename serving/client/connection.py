"""What both clients have in common: how they connect, what they retry, which errors they raise."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from loongjax.errors import ConfigError, LoongJaxError

_MAX_MESSAGE_BYTES = 256 * 2**20
OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)


class ServerError(LoongJaxError):
    """A server refused a call, or failed at it.

    Attributes:
      code: gRPC's name of what went wrong, such as `INVALID_ARGUMENT`.
      retry_after_s: When it is worth to try again [s]; None: the server did not say.
    """

    def __init__(self, message: str, *, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientTls:
    """PEM files for an encrypted connection.

    Attributes:
      ca: Who may have signed the server's certificate; None: those that the system trusts.
      cert, key: The client's own certificate and key, for servers that ask for one.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel.

        Raises:
          ConfigError: A file cannot be read, or `cert` and `key` are not together.
        """
        if (self.cert is None) != (self.key is None):
            raise ConfigError("a client's cert and key belong together; give both or neither")
        try:
            ca, key, cert = (
                None if path is None else path.read_bytes()
                for path in (self.ca, self.key, self.cert)
            )
        except OSError as error:
            raise ConfigError(f"a certificate cannot be read: {error}") from error
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """What is tried again: calls that ended with UNAVAILABLE before anything came of them.

    Attributes:
      attempts: How often at most, the first one included.
      first_s: Wait before the second one [s]; it doubles from then on, and is drawn from its upper
        half, so that clients which were refused together do not come back together.
      most_s: Longest wait [s].
    """

    attempts: int = 4
    first_s: float = 0.2
    most_s: float = 5.0
    draw: random.Random = field(default_factory=random.Random, repr=False)

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigError(f"attempts must be at least 1, not {self.attempts}")

    def wait_s(self, error: ServerError, attempt: int, has_begun: bool) -> float | None:
        """How long to wait after attempt number `attempt`, from 1 [s]; None: give up."""
        if has_begun or error.code != "UNAVAILABLE" or attempt >= self.attempts:
            return None
        most = min(self.most_s, self.first_s * 2 ** (attempt - 1))
        return max(error.retry_after_s or 0.0, most * self.draw.uniform(0.5, 1.0))


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with every call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def to_error(error: Any) -> ServerError:
    """An error of the grpc package as ours; sync and asyncio errors have the same methods."""
    trailer = dict(error.trailing_metadata() or ())
    after = trailer.get("retry-after")
    return ServerError(
        error.details() or "",
        code=error.code().name,
        retry_after_s=None if after is None else float(after),
    )
