"""`loongjax bench chaos`: a server among clients of every kind, and steps that fail.

Random prompts, lengths and sampling; aborts, dropped connections, expired deadlines, hostile
messages, slow readers, instances that drain and come back. Afterwards every request has had an end,
no slot is in use, every whole greedy answer is right, and the process is no bigger than before.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import psutil

from loongjax.bench.oracle import Oracle
from loongjax.errors import BenchError
from serving.bench.chaos_clients import KINDS, Ending, Result, Served, Target
from serving.bench.child import ServerProcess
from serving.stubs import cluster_pb2, cluster_pb2_grpc

_MODEL = "random:tiny"
_CONTEXT = 256
_OPEN = 48
"""Clients at a time."""
_HANG_S = 120
_LAZY_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""What asyncio's pool has at most: it starts them when they are first needed, in the order of
chance, so that they are no leak."""
_IDLE_S = 60.0
_DRAIN_S = 0.5
_MOST_GROWTH = 0.05
_LEAST_TO_GROW = 1_000
"""Of fewer requests a tenth is too few for a server's memory to have settled."""
_LOOKS, _LOOK_S = 10, 0.2


@dataclass(kw_only=True)
class ChaosReport:
    """What came of it.

    Attributes:
      requests: That were sent, hostile ones among them.
      completed, aborted, refused, failed: How they ended: with a whole answer; as their client
        wanted; told that they cannot be served; told that steps failed under them.
      without_end: That nobody told anything in time.
      unhandled: Ends that no client should see, such as INTERNAL without a failed step.
      wrong_tokens, ties: Whole greedy answers that are wrong, or that float32 cannot tell.
      checked_answers: Whole greedy answers that were checked.
      failed_steps, drains: What was done to the server.
      leaked_slots: Share of the pool in use at the end, in slots.
      rss_growth: Memory of the server at the end, relative to that after the first tenth, less 1.
      fd_growth, thread_growth: File descriptors and threads, likewise as differences.
      exit_code: Of the server, when it was asked to end.
      problems: The first unhandled ends and wrong answers.
    """

    requests: int = 0
    completed: int = 0
    aborted: int = 0
    refused: int = 0
    failed: int = 0
    without_end: int = 0
    unhandled: int = 0
    wrong_tokens: int = 0
    ties: int = 0
    checked_answers: int = 0
    failed_steps: int = 0
    drains: int = 0
    leaked_slots: int = 0
    rss_growth: float = 0.0
    fd_growth: int = 0
    thread_growth: int = 0
    exit_code: int = -1
    by_kind: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing went wrong."""
        wrong = self.without_end + self.unhandled + self.wrong_tokens + self.leaked_slots
        grows = self.requests >= _LEAST_TO_GROW and self.rss_growth > _MOST_GROWTH
        leaks = grows or self.fd_growth > 0 or self.thread_growth > _LAZY_THREADS
        return not (wrong or leaks or self.exit_code)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    rss: int
    fds: int
    threads: int


def run_chaos(
    server: Sequence[str], *, requests: int, instances: int = 4, seed: int = 0
) -> dict[str, Any]:
    """Runs it; gives the report as a mapping, with `passed`.

    Args:
      server: What Python is to run: a server whose steps fail now and then; it takes the options
        of `loongjax serve`.
      requests: How many to send.
      instances: Of the server.
      seed: Of all draws.

    Raises:
      BenchError: The server ended too early.
    """
    options = [
        "--model", _MODEL, "--served-model-name", "tiny", "--instances", str(instances),
        "--max-model-len", str(_CONTEXT), "--pool-slots", str(_CONTEXT), "--dtype", "float32",
        "--max-chunk-tokens", "64", "--max-message-mib", "1", "--log-format", "json",
    ]  # fmt: skip
    with ServerProcess([*server, *options]) as process:
        report, served = asyncio.run(_drive(process, requests, instances, seed))
        report.exit_code = process.end()
    _judge(report, served)
    return {"passed": report.passed, **asdict(report)}


async def _drive(
    server: ServerProcess, requests: int, instances: int, seed: int
) -> tuple[ChaosReport, list[Served]]:
    report = ChaosReport(requests=requests)
    served: list[Served] = []
    kinds: Counter[str] = Counter()
    chance = random.Random(seed)
    sizes = []
    for part in (requests // 10, requests - requests // 10):
        async with Target(server.grpc, server.http, _CONTEXT) as target:
            draining = asyncio.create_task(
                _drain_now_and_then(server.grpc, instances, chance, report)
            )
            await _send(target, part, chance, report, served, kinds)
            draining.cancel()
            with suppress(asyncio.CancelledError):
                await draining
        is_idle = await server.wait_until_idle(_IDLE_S)
        sizes.append(await _size_at_rest(server.pid))
    if not is_idle:
        report.problems.append("the server was still busy at the end")
    report.leaked_slots = int(server.metric("loongjax:instance_kv_used_slots"))
    report.failed_steps = int(server.metric("loongjax:failed_steps_total"))
    report.by_kind = dict(sorted(kinds.items()))
    first, last = sizes
    report.rss_growth = round(last.rss / first.rss - 1, 4)
    report.fd_growth, report.thread_growth = last.fds - first.fds, last.threads - first.threads
    return report, served


async def _send(
    target: Target,
    count: int,
    chance: random.Random,
    report: ChaosReport,
    served: list[Served],
    kinds: Counter[str],
) -> None:
    """Keeps as many clients open as there may be, until so many have come and gone."""
    left = iter(range(count))

    async def run() -> None:
        for _ in left:
            kind = chance.choices(list(KINDS), [each.weight for each in KINDS.values()])[0]
            kinds[kind] += 1
            own = random.Random(chance.random())
            try:
                ending, answer = await _within(_HANG_S, KINDS[kind].send(target, own))
            except TimeoutError:
                report.without_end += 1
                report.problems.append(f"{kind}: no end within {_HANG_S} s")
                continue
            if answer is not None:
                served.append(answer)
            _count(report, kind, ending)

    await asyncio.gather(*(run() for _ in range(_OPEN)))


async def _within(seconds: int, work: Awaitable[Result]) -> Result:
    """The result of the work; TimeoutError if it takes longer than this process has run for it.

    Second by second: what stops server and clients alike, such as a suspended machine, is no hang.
    """
    task = asyncio.ensure_future(work)
    for _ in range(seconds):
        if (await asyncio.wait({task}, timeout=1.0))[0]:
            return task.result()
    task.cancel()
    await asyncio.wait({task})
    raise TimeoutError


def _count(report: ChaosReport, kind: str, ending: Ending) -> None:
    match ending.how:
        case "completed":
            report.completed += 1
        case "aborted":
            report.aborted += 1
        case "refused":
            report.refused += 1
        case "failed":
            report.failed += 1
        case "unhandled":
            report.unhandled += 1
            if len(report.problems) < 20:
                report.problems.append(f"{kind}: {ending.message[:300]}")


async def _drain_now_and_then(
    address: str, instances: int, chance: random.Random, report: ChaosReport
) -> None:
    """Takes one instance after another out, and back in."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = cluster_pb2_grpc.ClusterStub(channel)
        while instances > 1:
            instance = chance.randrange(instances)
            try:
                await asyncio.sleep(_DRAIN_S)
                await stub.DrainInstance(cluster_pb2.DrainInstanceRequest(instance=instance))
                report.drains += 1
                await asyncio.sleep(_DRAIN_S)
            finally:
                request = cluster_pb2.ResumeInstanceRequest(instance=instance)
                await asyncio.shield(asyncio.ensure_future(_resume(stub, request)))


async def _resume(stub: Any, request: cluster_pb2.ResumeInstanceRequest) -> None:
    await stub.ResumeInstance(request)


def _judge(report: ChaosReport, served: Sequence[Served]) -> None:
    oracle = Oracle(_MODEL)
    for answer in served:
        report.checked_answers += 1
        match oracle.judge(answer.prompt, answer.tokens):
            case "wrong":
                report.wrong_tokens += 1
                if len(report.problems) < 20:
                    report.problems.append(f"wrong: {answer.prompt} -> {answer.tokens}")
            case "tie":
                report.ties += 1


async def _size_at_rest(pid: int) -> _Size:
    """Without the connections of clients that are gone, which a server takes a moment to close."""
    sizes = []
    for _ in range(_LOOKS):
        sizes.append(_size(pid))
        await asyncio.sleep(_LOOK_S)
    return min(sizes, key=lambda size: size.fds)


def _size(pid: int) -> _Size:
    try:
        process = psutil.Process(pid)
        return _Size(
            rss=process.memory_info().rss, fds=process.num_fds(), threads=process.num_threads()
        )
    except psutil.NoSuchProcess as error:
        raise BenchError("the server is gone; its log says why") from error
