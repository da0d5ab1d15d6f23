"""Who a client is, and what it may use: bearer tokens from files, read again when they change.

A file holds one client a line, `NAME TOKEN`; empty lines and those that begin with `#` do not
count. Several tokens may have one name: a client's old and new one. Requests of one name share one
turn (`serving.gate`), and the name stands in the log; a token never does.

Promises: tokens are compared in constant time, each with all; a file that turns unreadable or wrong
while the server runs changes nothing, and the log says so.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loongjax.errors import ConfigError
from serving.errors import ForbiddenError, UnknownClientError

_LOOK_S = 1.0
"""How often a file is looked at."""
_LEAST_LENGTH = 16

_log = logging.getLogger(__name__)


class Scope(enum.Enum):
    """What may be guarded by itself."""

    INFERENCE = "inference"
    CLUSTER = "cluster"


class TokenFile:
    """Tokens and their clients' names; may be used by one thread."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the file.

        Raises:
          ConfigError: It cannot be read, has no token, or a line is wrong.
        """
        self._path = path
        self._clock = clock
        self._looked = clock()
        self._stamp, self._clients = _read(path)

    def name_of(self, token: str) -> str | None:
        """The client that has this token; None if nobody has."""
        self._refresh()
        digest = _digest(token)
        found = None
        for known, name in self._clients:  # all of them, whichever fits
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        try:
            if _stamp(self._path) != self._stamp:
                self._stamp, self._clients = _read(self._path)
                _log.info("%d tokens read from %s", len(self._clients), self._path)
        except (OSError, ConfigError) as error:
            _log.error("the tokens stay as they were: %s", error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """Lets clients in.

    Attributes:
      tokens: By scope. Without any, inference is open to all; the cluster is so only if inference
        has none either, and else closed.
    """

    tokens: dict[Scope, TokenFile]

    @classmethod
    def of_files(cls, inference: Path | None, cluster: Path | None) -> Guard:
        """A guard with the tokens of these files.

        Raises:
          ConfigError: A file cannot be used.
        """
        files = {Scope.INFERENCE: inference, Scope.CLUSTER: cluster}
        return cls(tokens={scope: TokenFile(path) for scope, path in files.items() if path})

    def admit(self, scope: Scope, authorization: str | None, peer: str) -> str:
        """The client's name: its token's, or where it calls from if nobody needs a token.

        Args:
          scope: What it wants to use.
          authorization: `Bearer TOKEN`, or None.
          peer: Its address, or the name in its certificate.

        Raises:
          UnknownClientError: No token, or one that nobody has.
          ForbiddenError: The token is for something else.
        """
        own = self.tokens.get(scope)
        if own is None:
            if scope is Scope.INFERENCE or not self.tokens:
                return peer
            raise ForbiddenError(f"{scope.value} is closed: the server has no tokens for it")
        token = _bearer(authorization)
        if token is None:
            raise UnknownClientError("a token is needed: authorization: Bearer TOKEN")
        name = own.name_of(token)
        if name is not None:
            return name
        if any(file.name_of(token) for file in self.tokens.values()):
            raise ForbiddenError(
                f"this token is not for {scope.value}; use one of the {scope.value} tokens"
            )
        raise UnknownClientError("nobody has this token; was it withdrawn?")


def _bearer(authorization: str | None) -> str | None:
    kind, _, token = (authorization or "").strip().partition(" ")
    return token.strip() if kind.lower() == "bearer" and token.strip() else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(path: Path) -> tuple[tuple[int, int, int], tuple[tuple[bytes, str], ...]]:
    try:
        stamp, text = _stamp(path), path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {path} cannot be read: {error}") from error
    clients = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or len(words[1]) < _LEAST_LENGTH:
            raise ConfigError(
                f"line {number} of the token file {path} is not NAME TOKEN, with a token of at "
                f"least {_LEAST_LENGTH} characters"
            )
        clients.append((_digest(words[1]), words[0]))
    if not clients:
        raise ConfigError(f"the token file {path} has no token; nobody could use the server")
    return stamp, tuple(clients)
