"""A server process for tests: the real command, on a small random model."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc

PATIENCE_S = 300.0  # before a test fails; machines may be busy
ENDLESS = {"n": 128, "max_tokens": 250, "ignore_eos": True}  # 60 times what the pool holds
SERVE = ("-m", "loongjax.cli.main", "serve")
ENGINE = (
    "--instances", "2", "--max-model-len", "256", "--pool-slots", "256", "--max-chunk-tokens", "64"
)  # fmt: skip
NAME = "tiny"


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

    @property
    def http(self) -> str:
        """Its URL."""
        return self.report["http"]

    def wait_for(self, metric: str, value: float, context: ssl.SSLContext | None = None) -> None:
        """Until a metric that has no further labels has a value."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            with urllib.request.urlopen(f"{self.http}/metrics", context=context) as response:
                lines = response.read().decode().splitlines()
            (line,) = [each for each in lines if each.startswith(f"{metric}{{")]
            if float(line.split()[-1]) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{line}, not {value}")

    def wait_until_idle(self) -> None:
        """Until no request is open, and no slot of the pool in use."""
        end = time.monotonic() + PATIENCE_S
        with grpc.insecure_channel(self.grpc) as channel:
            stub = pb_grpc.VllmEngineStub(channel)
            while time.monotonic() < end:
                (load,) = stub.GetLoads(pb.GetLoadsRequest(), timeout=PATIENCE_S).loads
                info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S)
                if load.num_used_tokens == load.num_total_reqs == info.active_requests == 0:
                    return
                time.sleep(0.05)
        raise AssertionError(f"still busy: {load}, {info.active_requests} requests")

    def terminate(self) -> int:
        """Sends SIGTERM and gives the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextmanager
def server(
    model: Path,
    cache: Path,
    *arguments: str,
    program: Sequence[str] = SERVE,
    stderr: Path | None = None,
) -> Iterator[Server]:
    """Starts one, with compiled programs in `cache`, and kills it at the end if it still runs."""
    command = [*program, "--model", str(model), "--served-model-name", NAME, *ENGINE, "--json"]
    command += ["--port", "0", "--http-port", "0"]
    with nullcontext() if stderr is None else stderr.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended with code {process.wait(PATIENCE_S)}"
        yield Server(process=process, report=json.loads(line))
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()
