"""A response of server-sent events whose source is closed whatever happens to the client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.http.door import unless_gone
from serving.http.errors import ClientGoneError


class EventStream(Response):
    """Sends events as they come, until there are no more or the client goes.

    A client that reads slowly holds up nobody but itself: what it has not read stays where the
    events come from.
    """

    media_type = "text/event-stream"

    def __init__(self, request: Request, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._request = request
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        async with aclosing(self._events):
            with suppress(ClientGoneError):
                await unless_gone(self._request, self._send(send))

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
