"""Policies on the real engine: short prompts that keep coming while long ones are computed.

Every policy serves the same load on an engine of its own, one after the other. First short prompts
alone, which says what they take unloaded; then the same with long prompts among them.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loongjax.api.build import build_engine
from loongjax.config import EngineConfig
from loongjax.engine import Engine, Event, FinishedEvent, GenerationRequest
from loongjax.errors import BenchError
from loongjax.sampling.params import SamplingParams

_SHORT = (32, 256)
_SHORT_OUTPUT = 16
_LONG_OUTPUT = 4
_LEAD_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What comes.

    Attributes:
      short: Short prompts, of 32 to 256 tokens, by themselves and then at least so many among the
        long ones, for as long as those take.
      rate: How many of them come in a second, at random times.
      long: Long prompts, which come together with the first short ones.
      long_tokens: Their length.
      seed: Of lengths and times.
    """

    short: int
    rate: float
    long: int
    long_tokens: int
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class _Arrivals:
    """What has ended so far: seconds from arrival to first token by kind, and tokens."""

    short: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)
    tokens: int = 0
    open: int = 0
    error: str | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)


def measure_policy(model: str, config: EngineConfig, load: Load) -> dict[str, Any]:
    """Serves the load under the configured policy.

    Raises:
      BenchError: A request failed.
    """
    built = build_engine(model, config)
    with built.engine as engine:
        alone = _serve(engine, load, with_long=False)
        began = len(engine.steps())
        started = engine.now()
        found = _serve(engine, load, with_long=True)
        seconds = engine.now() - started
        chunks = [s.ended - s.started for s in engine.steps()[began:] if s.kind == "prefill"]
    return {
        "unloaded_ttft_s": _percentiles(alone.short),
        "short_ttft_s": _percentiles(found.short),
        "long_ttft_s": sum(found.long) / max(1, len(found.long)),
        "longest_chunk_s": max(chunks, default=0.0),
        "tokens_per_s": found.tokens / seconds,
        "short": len(found.short),
    }


def _serve(engine: Engine, load: Load, *, with_long: bool) -> _Arrivals:
    """Until all have ended: short prompts come as long as there are long ones."""
    chance, arrivals = random.Random(load.seed), _Arrivals()
    kind = "loaded" if with_long else "alone"
    time.sleep(_LEAD_S)
    for number in range(load.long if with_long else 0):
        _submit(engine, f"long-{number}", load.long_tokens, _LONG_OUTPUT, arrivals.long, arrivals)
    number = 0
    while number < load.short or (with_long and len(arrivals.long) < load.long):
        tokens = chance.randint(*_SHORT)
        name = f"{kind}-{number}"
        _submit(engine, name, tokens, _SHORT_OUTPUT, arrivals.short, arrivals)
        number += 1
        time.sleep(chance.expovariate(load.rate))
        if arrivals.error is not None:
            raise BenchError(f"a request failed: {arrivals.error}")
    with arrivals.changed:
        arrivals.changed.wait_for(lambda: not arrivals.open or arrivals.error is not None)
    if arrivals.error is not None:
        raise BenchError(f"a request failed: {arrivals.error}")
    return arrivals


def _submit(
    engine: Engine,
    name: str,
    tokens: int,
    output: int,
    ttfts: list[float],
    arrivals: _Arrivals,
) -> None:
    """Sends a prompt; its time to the first token goes to `ttfts` when it has ended."""

    def hear(event: Event) -> None:
        if not isinstance(event, FinishedEvent):
            return
        with arrivals.changed:
            times = event.timings
            if event.error is not None or times.first_token is None:
                arrivals.error = event.error or f"{name} ended without a token"
            else:
                ttfts.append(times.first_token - times.arrival)
            arrivals.tokens += tokens + output
            arrivals.open -= 1
            arrivals.changed.notify_all()

    with arrivals.changed:
        arrivals.open += 1
    # every prompt begins differently, so that none could share another's KV
    first = sum(name.encode()) % 251
    ids = [(first + i * 31) % 251 + 1 for i in range(tokens)]
    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    engine.submit(GenerationRequest(id=name, token_ids=ids, params=params), on_event=hear)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{part}": float(np.percentile(values, part)) for part in (50, 99)}
