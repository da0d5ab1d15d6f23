"""What clients may say beside a request, in the same words over both protocols."""

from __future__ import annotations

from uuid import uuid4

from loongjax.errors import RequestError

_MOST_NAME = 256


def request_name(asked: str | None) -> str:
    """The name for a request that a client asks for, or one of ours.

    Raises:
      RequestError: It is too long.
    """
    if not asked:
        return uuid4().hex
    if len(asked) > _MOST_NAME:
        raise RequestError(
            f"the request id has {len(asked)} characters; at most {_MOST_NAME} are taken"
        )
    return asked


def priority(text: str | None) -> int:
    """The priority that `x-priority` asks for; 0 without it.

    Raises:
      RequestError: It is not a whole number.
    """
    try:
        return int(text or 0)
    except ValueError:
        raise RequestError(f"x-priority must be a whole number, not {text!r}") from None
