"""A server process for tests: the real command, on a small random model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

EXIT_S = 120.0
MODEL = ("--model", "random:tiny", "--max-model-len", "256", "--pool-slots", "256")


@dataclass
class Server:
    """A process that is ready.

    Attributes:
      process: It.
      report: The line that it printed.
    """

    process: subprocess.Popen[str]
    report: dict

    @property
    def grpc(self) -> str:
        """Its address."""
        return self.report["grpc"]

    def terminate(self) -> int:
        """Sends SIGTERM and gives the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(EXIT_S)


@contextmanager
def server(cache: Path, *arguments: str) -> Iterator[Server]:
    """Starts one, with compiled programs in `cache`, and kills it at the end if it still runs."""
    command = [sys.executable, "-m", "loongjax.cli.main", "serve", *MODEL, "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended with code {process.wait(EXIT_S)}"
        yield Server(process=process, report=json.loads(line))
    finally:
        process.kill()
        process.wait(EXIT_S)
        process.stdout.close()
