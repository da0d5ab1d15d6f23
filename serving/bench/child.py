"""A server as a child process: started, asked how it does, ended."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from loongjax.errors import BenchError

_END_S = 120.0


class ServerProcess:
    """Use it as a context manager.

    Attributes:
      grpc: Its gRPC address.
      http: The URL of its HTTP side.
      startup_s: What it took to be ready, by its own account [s].
      pid: Its process.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Starts it on free ports, and waits until it is ready.

        Args:
          command: What Python is to run; it takes the options of `loongjax serve`.

        Raises:
          BenchError: It ended before it was ready; it has said why on stderr.
        """
        own = ["--port", "0", "--http-port", "0", "--json"]
        self._process = subprocess.Popen(
            [sys.executable, *command, *own], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise BenchError(f"the server ended with code {code} before it was ready")
        report = json.loads(line)
        self.grpc: str = report["grpc"]
        self.http: str = report["http"]
        self.startup_s: float = report["startup_s"]
        self.pid = self._process.pid

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, from `/metrics`.

        Raises:
          BenchError: There is no such metric.
        """
        with urllib.request.urlopen(f"{self.http}/metrics") as response:
            lines = response.read().decode().splitlines()
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.split("{")[0].split(" ")[0] == name
        ]
        if not values:
            raise BenchError(f"the server has no metric {name}")
        return sum(values)

    async def wait_until_idle(self, patience_s: float) -> bool:
        """Waits until no KV is in use and nobody waits; says whether that came to pass."""
        loop = asyncio.get_running_loop()
        end = loop.time() + patience_s
        names = (
            "vllm:kv_cache_usage_perc",
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "loongjax:open_requests",
        )
        while loop.time() < end:
            if not any([await asyncio.to_thread(self.metric, name) for name in names]):
                return True
            await asyncio.sleep(0.3)  # the engine's figures may be 0.25 s old
        return False

    def end(self) -> int:
        """Asks it to end; gives its exit code, which is negative if it had to be killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._kill()
        return self._process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
