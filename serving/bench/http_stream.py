"""A small HTTP/1.1 client for streams of events, which can also misbehave on purpose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from loongjax.errors import LoongJaxError

_LIMIT = 2**22


class HttpError(LoongJaxError):
    """An answer that is an error.

    Attributes:
      status: Its HTTP status; 200 for one that stood in a stream.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Connection:
    """One connection for one request. Use it as an asynchronous context manager."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection(
            self._host, self._port, limit=_LIMIT
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def send(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sends a POST."""
        lines = [f"POST {path} HTTP/1.1", f"host: {self._host}", "connection: close"]
        own = {"content-type": "application/json", "content-length": str(len(body))}
        lines += [f"{name}: {value}" for name, value in (own | dict(headers or {})).items()]
        self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self._writer.drain()

    async def status(self) -> int:
        """The status of the answer, whose headers are read to their end."""
        line = await self._reader.readline()
        if not line:
            raise HttpError(0, "the connection was closed without an answer")
        while (await self._reader.readline()).strip():
            pass
        return int(line.split()[1])

    async def body(self) -> bytes:
        """All that comes until the connection is closed."""
        return await self._reader.read()

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream, after `status`.

        Raises:
          HttpError: One of them is an error, or the stream breaks off.
        """
        async for line in self._reader:
            if not line.startswith(b"data: "):
                continue  # sizes of chunks, empty lines
            content = line.removeprefix(b"data: ").strip()
            if content == b"[DONE]":
                return
            event = json.loads(content)
            if "error" in event:
                raise HttpError(200, f"{event['error']['code']}: {event['error']['message']}")
            yield event
        raise HttpError(0, "the stream broke off")


async def stream_completion(url: str, body: Mapping[str, Any]) -> AsyncGenerator[dict, None]:
    """Events of a streamed completion; closing it drops the connection.

    Raises:
      HttpError: The server refused it, or failed.
    """
    async with Connection(url) as connection:
        await connection.send("/v1/completions", json.dumps(body).encode())
        status = await connection.status()
        if status != 200:
            raise HttpError(status, (await connection.body()).decode("utf-8", "replace"))
        async for event in connection.events():
            yield event
