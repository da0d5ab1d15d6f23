"""A server's life, from a running engine to its exit.

Ready is said once everything answers. The first SIGTERM or SIGINT drains: health turns
NOT_SERVING, new requests are refused, open ones may end within the grace time, which a second
signal ends. If the engine dies first, health turns NOT_SERVING, open requests end with its error,
and `serve` raises.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loongjax.api.build import BuiltEngine
from loongjax.engine import Engine
from loongjax.errors import EngineClosedError
from serving.auth import Guard
from serving.config import ServeConfig
from serving.grpc.server import GrpcServer
from serving.http.app import make_app
from serving.http.server import HttpServer
from serving.logs import log_request
from serving.metrics import Metrics
from serving.service import Service
from serving.steering import Steering
from serving.steps import StepFeed

_LOOK_S = 0.5
"""How often the engine is looked at; its open requests know of its death at once."""
_LAST_WORDS_S = 2.0
"""What it may take until every request has been told its end."""
_FAREWELL_S = 0.2
"""What is left to other calls then; some never end by themselves, such as those that watch."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Addresses:
    """Where a server listens; `http` None: it does not."""

    grpc: str
    http: str | None


def serve(
    built: BuiltEngine,
    model_name: str,
    config: ServeConfig,
    on_ready: Callable[[Addresses], object],
) -> None:
    """Serves until a signal ends it.

    The engine is not closed then, but idle: to give back programs such as the demo's takes many
    seconds, for which nobody has to wait at the end of a process.

    Raises:
      ConfigError: An address, a certificate or a token file cannot be used.
      EngineClosedError: The engine died.
    """
    asyncio.run(_serve(built, model_name, config, on_ready))


async def _serve(
    built: BuiltEngine,
    model_name: str,
    config: ServeConfig,
    on_ready: Callable[[Addresses], object],
) -> None:
    guard = Guard.of_files(config.token_file, config.cluster_token_file)
    service = Service(built=built, model_name=model_name, limits=config.limits)
    metrics = Metrics(service)
    service.observers = (log_request, metrics.observe)
    feed = StepFeed(built.engine, [metrics.count_steps])
    grpc = GrpcServer(service, Steering(built), feed, config, guard)
    http = _http(service, guard, metrics, config)
    following = asyncio.create_task(feed.run())
    with _signals() as (asked, hurried):
        await grpc.start()
        if http is not None:
            await http.start()
        on_ready(Addresses(grpc=grpc.address, http=None if http is None else http.address))
        await _until(asked, built.engine)
        await grpc.set_ready(False)
        if built.engine.alive:
            await _drain(service, config.grace_s, hurried)
            service.cut_off()
        died = not asked.is_set()
        await service.wait_until_idle(_LAST_WORDS_S)
        await asyncio.gather(*(each.stop(_FAREWELL_S) for each in (grpc, http) if each))
    following.cancel()
    if died:
        raise EngineClosedError("the engine died, and the server with it; the log says of what")
    _log.info("ended")


def _http(
    service: Service, guard: Guard, metrics: Metrics, config: ServeConfig
) -> HttpServer | None:
    if config.http_port is None:
        return None
    return HttpServer(make_app(service, guard, metrics), config, config.http_port)


async def _drain(service: Service, grace_s: float, hurried: asyncio.Event) -> None:
    """Lets open requests end, for as long as they may."""
    _log.info("draining %d open requests", service.open_requests)
    tasks = [asyncio.ensure_future(each) for each in (service.drain(grace_s), hurried.wait())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    if service.open_requests:
        _log.warning("%d requests are cut off", service.open_requests)


@contextmanager
def _signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Events that are set when this process is asked to end, and when it is asked again."""
    asked, hurried = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    kinds = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        (hurried if asked.is_set() else asked).set()

    for kind in kinds:
        loop.add_signal_handler(kind, on_signal)
    try:
        yield asked, hurried
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)


async def _until(asked: asyncio.Event, engine: Engine) -> None:
    """Waits until somebody asks for the end, or the engine comes to its own."""
    while engine.alive and not asked.is_set():
        try:
            await asyncio.wait_for(asked.wait(), _LOOK_S)
        except TimeoutError:
            continue
