"""`loongjax bench serve`: TTFT, TPOT and goodput of a server, at one or several rates.

Beside them, what serving costs: CPU time of the server's own thread for each token that came, and,
where asked for, what the bare engine does with the same requests.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loongjax.errors import BenchError
from loongjax.simulator.traces import read_trace
from serving.bench.child import ServerProcess
from serving.bench.load import (
    Outcome,
    Protocol,
    Question,
    Sender,
    closed_loop,
    draw_questions,
    open_loop,
)
from serving.bench.report import Objective, summarize

_WARM_UP = 8
_PATIENCE_S = 60.0
_LEAST_VOCAB = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What to send.

    Attributes:
      rates: Requests a second, one run for each; empty: a closed loop, or a trace's own times.
      clients: Of a closed loop.
      requests: In each run; of a trace the first ones.
      prompt_tokens, answer_tokens: Drawn between half and one and a half of these.
      trace: A file whose times and lengths are sent instead.
      protocol: How.
      seed: Of all draws.
    """

    rates: tuple[float, ...] = ()
    clients: int = 8
    requests: int = 100
    prompt_tokens: int = 64
    answer_tokens: int = 32
    trace: str | None = None
    protocol: Protocol = "grpc"
    seed: int = 0

    def questions(self, rate: float) -> list[Question]:
        """The requests of a run; RequestError if a trace cannot be read."""
        if self.trace is None:
            return draw_questions(
                count=self.requests,
                rate=rate,
                prompt_tokens=self.prompt_tokens,
                answer_tokens=self.answer_tokens,
                vocab=_LEAST_VOCAB,
                seed=self.seed,
            )
        return [
            Question(
                arrival_s=job.arrival,
                prompt=tuple((job.prompt + at) % _LEAST_VOCAB for at in range(job.prompt)),
                answer_tokens=job.output,
            )
            for job in read_trace(self.trace, count=self.requests)
        ]


def run_serve_bench(
    server: Sequence[str],
    model: str,
    load: Load,
    objective: Objective,
    bare: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Starts a server, and measures it.

    Args:
      server: What Python is to run: a server of this model, and its options.
      model: What it calls the model.
      load: What to send.
      objective: What a request has to meet to count for goodput.
      bare: What Python is to run to measure the bare engine; None: it is not measured.

    Raises:
      BenchError: The server or the bare engine ended too early.
      RequestError: The trace cannot be read.
    """
    runs = []
    load.questions(1.0)  # a trace that cannot be read is told before a server is started
    with ServerProcess(server) as process:
        startup_s = process.startup_s
        for rate in load.rates or (None,):
            runs.append(asyncio.run(_measure(process, model, load, objective, rate)))
        if (code := process.end()) != 0:
            raise BenchError(f"the server ended with code {code}")
    report: dict[str, Any] = {
        "protocol": load.protocol,
        "startup_s": startup_s,
        "objective": {"ttft_s": objective.ttft_s, "tpot_s": objective.tpot_s},
        "runs": runs,
    }
    if bare is not None:
        found = _run_bare(bare, load)
        report["bare_engine"] = found
        report["ratio_to_bare_engine"] = round(
            runs[-1]["output_tokens_per_s"] / found["output_tokens_per_s"], 3
        )
    return report


async def _measure(
    server: ServerProcess, model: str, load: Load, objective: Objective, rate: float | None
) -> dict[str, Any]:
    questions = load.questions(rate or 1.0)
    addresses = {"grpc": server.grpc, "http": server.http, "model": model}
    async with Sender(load.protocol, **addresses) as sender:
        await closed_loop(sender, questions[:_WARM_UP], clients=2)
        if not await server.wait_until_idle(_PATIENCE_S):
            raise BenchError(f"the server is still busy {_PATIENCE_S:g} s after the warm-up")
        cpu_s = server.metric("loongjax:service_cpu_seconds_total")
        if rate is None and load.trace is None:
            outcomes, duration_s = await closed_loop(sender, questions, load.clients)
            pace: dict[str, Any] = {"clients": load.clients}
        else:
            outcomes, duration_s = await open_loop(sender, questions)
            pace = {"rate": rate}
        cpu_s = server.metric("loongjax:service_cpu_seconds_total") - cpu_s
    return (
        pace
        | summarize(outcomes, duration_s, objective)
        | {"service_us_per_token": _us(cpu_s, outcomes)}
    )


def _us(cpu_s: float, outcomes: Sequence[Outcome]) -> float | None:
    tokens = sum(outcome.tokens for outcome in outcomes)
    return round(1e6 * cpu_s / tokens, 1) if tokens else None


def _run_bare(command: Sequence[str], load: Load) -> dict[str, Any]:
    asked = [[question.prompt, question.answer_tokens] for question in load.questions(1.0)]
    done = subprocess.run(
        [sys.executable, *command],
        input=json.dumps({"clients": load.clients, "questions": asked}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"the bare engine ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
