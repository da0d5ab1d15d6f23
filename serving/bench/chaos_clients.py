"""Clients of every kind, and how each of their requests ended."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import grpc
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

from loongjax.sampling.params import SamplingParams
from serving.bench import fuzz
from serving.bench.http_stream import Connection, HttpError, stream_completion
from serving.client import AsyncClient, RetryPolicy, ServerError
from serving.client.messages import Prompt

How: TypeAlias = Literal["completed", "aborted", "refused", "failed", "unhandled"]

_REFUSALS = {
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "NOT_FOUND",
    "UNAVAILABLE",
}
_GIVEN_UP = {"CANCELLED", "DEADLINE_EXCEEDED"}
_VOCAB = 512
_INJECTED = "its KV was lost to"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a request ended, and what was said."""

    how: How
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A whole greedy answer."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


Result: TypeAlias = tuple[Ending, Served | None]
_COMPLETED = Ending(how="completed")
_ABORTED = Ending(how="aborted")


class Target:
    """A server and the connections to it. Use it as an asynchronous context manager."""

    def __init__(self, grpc_address: str, http: str, context: int) -> None:
        self.http = http
        self.context = context
        self.client = AsyncClient(grpc_address, retry=RetryPolicy(attempts=1))
        self.channel = grpc.aio.insecure_channel(grpc_address)
        self.vllm = vllm_engine_pb2_grpc.VllmEngineStub(self.channel)

    async def __aenter__(self) -> Target:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()
        await self.channel.close()

    def draw(self, chance: random.Random) -> tuple[tuple[int, ...], int]:
        """A prompt and how many tokens to ask for; together they fit."""
        length = chance.choice([1, 3, 20, 60, 150])
        most = min(self.context - length, chance.choice([1, 5, 20, 60]))
        return tuple(chance.randrange(_VOCAB) for _ in range(length)), chance.randint(1, most)


async def _greedy(target: Target, chance: random.Random) -> Result:
    prompt, count = target.draw(chance)
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    answer = await target.client.generate(prompt, params, priority=chance.randint(-1, 1))
    return _COMPLETED, Served(prompt=prompt, tokens=answer.token_ids)


async def _greedy_http(target: Target, chance: random.Random) -> Result:
    prompt, count = target.draw(chance)
    ids: list[int] = []
    async with aclosing(stream_completion(target.http, _body(prompt, count))) as events:
        async for event in events:
            ids += event["choices"][0]["token_ids"]
    return _COMPLETED, Served(prompt=prompt, tokens=tuple(ids))


async def _sampled(target: Target, chance: random.Random) -> Result:
    prompt, count = target.draw(chance)
    params = SamplingParams(
        temperature=chance.choice([0.3, 1.0, 5.0]),
        n=chance.choice([1, 1, 2, 5]),
        seed=chance.choice([None, 7]),
        max_tokens=count,
        stop_token_ids=tuple(chance.randrange(_VOCAB) for _ in range(20)),
    )
    await target.client.generate(prompt, params)
    return _COMPLETED, None


async def _batch(target: Target, chance: random.Random) -> Result:
    prompts = [target.draw(chance)[0] for _ in range(chance.randint(1, 6))]
    params = SamplingParams(temperature=0, max_tokens=chance.randint(1, 20))
    async for answer in target.client.batch(prompts, params):
        if answer.error is not None:
            code, _, message = answer.error.partition(": ")
            return _of_code(code, message), None
    return _COMPLETED, None


async def _slow(target: Target, chance: random.Random) -> Result:
    prompt, count = target.draw(chance)
    ids: list[int] = []
    async with aclosing(stream_completion(target.http, _body(prompt, count))) as events:
        async for event in events:
            await asyncio.sleep(chance.uniform(0, 0.2))
            ids += event["choices"][0]["token_ids"]
    return _COMPLETED, Served(prompt=prompt, tokens=tuple(ids))


async def _aborted(target: Target, chance: random.Random) -> Result:
    prompt, _ = target.draw(chance)
    name = f"chaos-{chance.random()}"
    request = vllm_engine_pb2.GenerateRequest(request_id=name, stream=True)
    request.tokenized.input_ids.extend(prompt)
    request.sampling_params.ignore_eos = True
    call = target.vllm.Generate(request)
    pieces = chance.randint(0, 4)
    if pieces == 0:
        await asyncio.sleep(chance.uniform(0, 0.05))
    reason = "without an end"
    asked = pieces == 0
    if asked:
        await target.vllm.Abort(vllm_engine_pb2.AbortRequest(request_ids=[name]))
    async for response in call:
        if response.WhichOneof("response") == "complete":
            reason = response.complete.finish_reason
        pieces -= 1
        if pieces <= 0 and not asked:
            asked = True
            await target.vllm.Abort(vllm_engine_pb2.AbortRequest(request_ids=[name]))
    if reason not in ("abort", "length"):
        return Ending(how="unhandled", message=f"an aborted request ended {reason}"), None
    return _ABORTED, None


async def _dropped(target: Target, chance: random.Random) -> Result:
    prompt, count = target.draw(chance)
    left = chance.randint(0, 3)
    if chance.random() < 0.5:
        async with aclosing(stream_completion(target.http, _body(prompt, count))) as events:
            async for _ in events:
                left -= 1
                if left <= 0:
                    break
        return _ABORTED, None
    async with aclosing(target.client.stream(prompt)) as pieces:
        async for _ in pieces:
            left -= 1
            if left <= 0:
                break
    return _ABORTED, None


async def _gone_at_once(target: Target, chance: random.Random) -> Result:
    prompt, count = target.draw(chance)
    async with Connection(target.http) as connection:
        stream = chance.random() < 0.5
        body = _body(prompt, count) | {"stream": stream}
        await connection.send("/v1/completions", json.dumps(body).encode())
        await asyncio.sleep(chance.uniform(0, 0.02))
    return _ABORTED, None


async def _late(target: Target, chance: random.Random) -> Result:
    prompt, _ = target.draw(chance)
    await target.client.generate(prompt, timeout_s=chance.uniform(0.001, 0.1))
    return _COMPLETED, None


async def _impossible(target: Target, chance: random.Random) -> Result:
    prompt, _ = target.draw(chance)
    params = SamplingParams(max_tokens=target.context + 1)
    wrong: list[tuple[Prompt, SamplingParams | None]] = [
        ((), None),
        (prompt, params),
        ((_VOCAB + 1,), None),
        ("x" * 999, None),
    ]
    asked, how = chance.choice(wrong)
    await target.client.generate(asked, how)
    return Ending(how="unhandled", message=f"an impossible request was answered: {asked}"), None


async def _hostile_grpc(target: Target, chance: random.Random) -> Result:
    method, data = fuzz.grpc_message(chance)
    call = target.channel.unary_stream(method)(data, timeout=30)
    async for _ in call:
        pass
    return _COMPLETED, None


async def _hostile_http(target: Target, chance: random.Random) -> Result:
    path, data = fuzz.http_body(chance)
    async with Connection(target.http) as connection:
        await connection.send(path, data)
        status = await connection.status()
        body = await connection.body()
    if status >= 500:
        raise HttpError(status, f"{path} {data!r}: {body[:200]!r}")
    return (_COMPLETED if status < 400 else Ending(how="refused")), None


async def _noise(target: Target, chance: random.Random) -> Result:
    host, _, port = target.http.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.write(fuzz.http_noise(chance))
    with suppress(OSError):
        await writer.drain()
    await asyncio.sleep(chance.uniform(0, 0.1))
    writer.close()
    return Ending(how="refused"), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of client: how to send one of its requests, and how many there are of it."""

    ask: Callable[[Target, random.Random], Awaitable[Result]]
    weight: int

    async def send(self, target: Target, chance: random.Random) -> Result:
        """Sends one; whatever is raised becomes its ending."""
        try:
            return await self.ask(target, chance)
        except ServerError as error:
            return _of_code(error.code, str(error)), None
        except grpc.aio.AioRpcError as error:
            return _of_code(error.code().name, error.details() or ""), None
        except HttpError as error:
            return _of_status(error), None
        except OSError as error:
            return Ending(how="unhandled", message=f"{type(error).__name__}: {error}"), None


KINDS = {
    "greedy": Kind(ask=_greedy, weight=30),
    "greedy_http": Kind(ask=_greedy_http, weight=12),
    "sampled": Kind(ask=_sampled, weight=10),
    "batch": Kind(ask=_batch, weight=4),
    "slow": Kind(ask=_slow, weight=3),
    "aborted": Kind(ask=_aborted, weight=8),
    "dropped": Kind(ask=_dropped, weight=8),
    "gone_at_once": Kind(ask=_gone_at_once, weight=4),
    "late": Kind(ask=_late, weight=6),
    "impossible": Kind(ask=_impossible, weight=3),
    "hostile_grpc": Kind(ask=_hostile_grpc, weight=6),
    "hostile_http": Kind(ask=_hostile_http, weight=5),
    "noise": Kind(ask=_noise, weight=1),
}


def _of_code(code: str, message: str) -> Ending:
    if code in _REFUSALS:
        return Ending(how="refused", message=message)
    if code in _GIVEN_UP:
        return _ABORTED
    if _INJECTED in message:
        return Ending(how="failed", message=message)
    return Ending(how="unhandled", message=f"{code}: {message}")


def _of_status(error: HttpError) -> Ending:
    if _INJECTED in str(error):
        return Ending(how="failed", message=str(error))
    how: How = "refused" if 400 <= error.status < 500 else "unhandled"
    return Ending(how=how, message=str(error))


def _body(prompt: tuple[int, ...], count: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
