"""What every HTTP request passes before its body is read: who asks, and how much they send."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loongjax.errors import LoongJaxError
from serving.auth import Guard
from serving.auth import Scope as GuardedScope
from serving.errors import OversizedError, status_of
from serving.http.errors import ClientGoneError, error_response

PUBLIC = frozenset({"/health", "/ready", "/metrics", "/openapi.json"})
T = TypeVar("T")


class Door:
    """Guards an ASGI app; the client's name stands in `request.state.client` behind it."""

    def __init__(self, app: ASGIApp, *, guard: Guard, max_bytes: int) -> None:
        self._app = app
        self._guard = guard
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request in, or answers it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except LoongJaxError as error:
            await error_response(status_of(error))(scope, receive, send)
            return
        await self._app(scope, _Limited(receive, self._max_bytes), send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["path"] not in PUBLIC:
            host = scope["client"][0] if scope.get("client") else "local"
            client = self._guard.admit(GuardedScope.INFERENCE, headers.get("authorization"), host)
            scope.setdefault("state", {})["client"] = client
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise OversizedError(_too_long(int(length), self._max_bytes))


class _Limited:
    """Receives a body, up to a limit."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._bytes = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._max_bytes:
            raise HTTPException(413, _too_long(self._bytes, self._max_bytes))
        return message


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Does the work, and drops it as soon as the client closes the connection.

    The request's body must have been read.

    Raises:
      ClientGoneError: It did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_long(length: int, limit: int) -> str:
    return f"the body has {length} bytes or more, and the limit is {limit}; send less"
