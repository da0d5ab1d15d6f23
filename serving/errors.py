"""Errors of the service, and the one table that says how any error is told to a client.

    LoongJaxError
    ├── UnsupportedError     a feature of the protocol that this server does not have
    ├── UnknownClientError   no token, or one that nobody has
    ├── ForbiddenError       a known client that may not do this
    ├── AbsentError          what was named does not exist
    ├── OversizedError       a message larger than the limit
    ├── BusyError            a limit is reached that will have room again
    └── DrainingError        the server is about to end

A client always gets the message, which names value, limit and way out, but no more of it than fits
into a trailer: a value may be as long as a message. What is not in the table is a fault of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpc import StatusCode

from loongjax.errors import EngineClosedError, LoongJaxError, UserError


class UnsupportedError(LoongJaxError):
    """A client asked for a feature that this server does not have."""


class UnknownClientError(LoongJaxError):
    """A client did not say who it is, or said it wrongly."""


class ForbiddenError(LoongJaxError):
    """A client asked for what it may not do."""


class AbsentError(LoongJaxError):
    """What a client named does not exist."""


class OversizedError(LoongJaxError):
    """A message is larger than the server takes."""


class DrainingError(LoongJaxError):
    """The server takes no new requests, since it is about to end."""


class BusyError(LoongJaxError):
    """A limit is reached.

    Attributes:
      retry_after_s: When it is worth to try again [s].
    """

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How an error is told.

    Attributes:
      grpc: The code of a gRPC status.
      http: The code of an HTTP response.
      message: The sentence for the client.
      retry_after_s: When it is worth to try again [s]; None: it is not, or nobody knows.
    """

    grpc: StatusCode
    http: int
    message: str
    retry_after_s: int | None = None


# Characters of a message. A gRPC client takes trailers of 8 KiB, and each may be 12 bytes there.
_MOST_TOLD = 600
_GAP = " […] "

# The first class that fits counts. A request that can never fit (CapacityError) is a UserError:
# a retry would not help it, so it is not told as exhausted.
_CODES: tuple[tuple[type[Exception], StatusCode, int], ...] = (
    (UnsupportedError, StatusCode.UNIMPLEMENTED, 501),
    (UnknownClientError, StatusCode.UNAUTHENTICATED, 401),
    (ForbiddenError, StatusCode.PERMISSION_DENIED, 403),
    (AbsentError, StatusCode.NOT_FOUND, 404),
    (OversizedError, StatusCode.RESOURCE_EXHAUSTED, 413),
    (BusyError, StatusCode.RESOURCE_EXHAUSTED, 429),
    (DrainingError, StatusCode.UNAVAILABLE, 503),
    (EngineClosedError, StatusCode.UNAVAILABLE, 503),
    (UserError, StatusCode.INVALID_ARGUMENT, 400),
    (LoongJaxError, StatusCode.INTERNAL, 500),
)


def brief(text: str) -> str:
    """The text, or its beginning and its end if it is long."""
    if len(text) <= _MOST_TOLD:
        return text
    half = (_MOST_TOLD - len(_GAP)) // 2
    return text[:half] + _GAP + text[-half:]


def status_of(error: LoongJaxError) -> Status:
    """How an error is told to a client."""
    code, http = next((code, http) for kind, code, http in _CODES if isinstance(error, kind))
    retry_after_s = error.retry_after_s if isinstance(error, BusyError) else None
    return Status(grpc=code, http=http, message=brief(str(error)), retry_after_s=retry_after_s)
