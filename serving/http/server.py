"""The HTTP server: uvicorn, in the loop and under the signals of the whole process."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from loongjax.errors import ConfigError
from serving.config import ServeConfig, join_address
from serving.preflight import listen

_BACKLOG = 2048
_TICK_S = 1.0
"""How often the `date` header is renewed; uvicorn itself wakes the loop ten times as often."""


class HttpServer:
    """An HTTP server on its address; belongs to one asyncio loop.

    Attributes:
      address: Where it listens, with its scheme.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, port: int) -> None:
        """Takes the address.

        Raises:
          ConfigError: It is in use, or not of this machine; or a certificate cannot be used.
        """
        self._socket = listen(config.host, port, "--http-port", _BACKLOG)
        tls = config.tls
        options = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            loop="none",
            backlog=_BACKLOG,
            ssl_certfile=None if tls is None else tls.cert,
            ssl_keyfile=None if tls is None else tls.key,
            ssl_ca_certs=None if tls is None or tls.client_ca is None else str(tls.client_ca),
            ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
        )
        try:
            options.load()
        except (OSError, ssl.SSLError) as error:
            self._socket.close()
            raise ConfigError(f"the certificate cannot be used: {error}") from error
        self._server = _Server(options)
        scheme = "http" if tls is None else "https"
        address = join_address(config.host, self._socket.getsockname()[1])
        self.address = f"{scheme}://{address}"
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answers from now on."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)

    async def stop(self, grace_s: float) -> None:
        """Takes no more requests; what is open after `grace_s` is cancelled."""
        # Declared as whole seconds, and used as any number of them.
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]
        self._server.end()
        if self._task is not None:
            await self._task


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._asked = asyncio.Event()

    def end(self) -> None:
        """Ends `serve`."""
        self.should_exit = True
        self._asked.set()

    async def main_loop(self) -> None:
        """What runs between start and end."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), _TICK_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the process."""
        yield
