"""Random regrouping for as long as you like: nothing hangs, leaks, or says something else.

    python scripts/soak.py --seconds 600 --instances 4 --json

Requests with known answers come and go, some are aborted, and a policy decides by chance what
runs where (`scripts/random_policy.py`). Ends with exit code 1 if a request got no answer in time,
if an answer differs from the one that a single instance gives, if KV slots stay in use, or if the
books of the pool do not add up. `--engines 2` lets two engines share the devices.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ is None:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from loongjax.api.build import build_engine
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.engine import (
    Engine,
    FinishedEvent,
    GenerationRequest,
    RequestHandle,
    TokensEvent,
)
from loongjax.errors import ConfigError, LoongJaxError, StepError, UserError
from loongjax.sampling.params import SamplingParams
from loongjax.timeline import Timeline
from scripts.random_policy import RandomPolicy
from scripts.soak_report import Report, look_back

MODEL = "random:tiny"
PROMPTS = 24
OPEN = 10
"""Requests that are open at a time."""
MAX_CHUNK_TOKENS = 64
PICTURE_S = 0.5
"""Of the end of a soak that is drawn; more would be too small to see."""
HANG_S = 120.0
"""A request that says nothing for so long makes it a hang."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and the tokens that answer it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def soak(
    *,
    seconds: float,
    instances: int,
    seed: int = 0,
    engines: int = 1,
    program_dir: Path | None = None,
    hang_s: float = HANG_S,
    picture: Path | None = None,
) -> Report:
    """Runs it; `program_dir` as in `EngineConfig`. `picture` gets the end of it, drawn.

    Where something hung, the engines are left as they are: to close them might hang too.

    Raises ConfigError for numbers below one, or a picture without matplotlib.
    """
    if min(seconds, instances, engines) <= 0:
        raise ConfigError(
            f"seconds, instances and engines must be positive, not {seconds:g}, {instances} and "
            f"{engines}"
        )
    if picture is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{picture} cannot be drawn: install matplotlib, or leave it out")
    config = EngineConfig(
        cluster=ClusterConfig(instances=instances, degrees=tuple(range(1, instances + 1))),
        pool=PoolConfig(block_size=4, slots=512),
        max_model_len=256,
        max_chunk_tokens=MAX_CHUNK_TOKENS,
        program_dir=program_dir,
    )
    questions = _questions(config, seed)
    built = [
        build_engine(MODEL, config, RandomPolicy(seed=seed + i)).engine for i in range(engines)
    ]
    for engine in built:
        _warm_up(engine, questions, seed, hang_s)
    report = _drive_all(built, questions, seconds, seed, hang_s)
    for engine in built:
        _wait_until_empty(engine, hang_s if not report.hung else 0.0)
        look_back(engine, report)
    if picture is not None:
        everything = Timeline.of_engine(built[0])
        everything.between(everything.bounds[1] - PICTURE_S).plot(picture)
    if not report.hung:
        for engine in built:
            _close(engine, report)
    return report


def _drive_all(
    engines: Sequence[Engine],
    questions: Sequence[Question],
    seconds: float,
    seed: int,
    hang_s: float,
) -> Report:
    """Drives all engines at once; counts how requests ended."""
    report = Report()
    totals: Counter[str] = Counter()
    lock = threading.Lock()

    def drive(engine: Engine, own_seed: int) -> None:
        counts: Counter[str] = Counter()
        try:
            _drive(engine, questions, seconds, own_seed, hang_s, counts)
        except Exception as error:
            _log.exception("a client of an engine failed")
            report.problems.append(f"{type(error).__name__}: {error}")
        with lock:
            totals.update(counts)

    started = time.monotonic()
    threads = [
        threading.Thread(target=drive, args=(engine, seed + i), daemon=True)
        for i, engine in enumerate(engines)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 2 * hang_s)
    report.seconds = round(time.monotonic() - started, 1)
    report.hung = totals.pop("hung", 0) + sum(thread.is_alive() for thread in threads)
    report.differing = totals.pop("differing", 0)
    report.requests = dict(sorted(totals.items()))
    return report


def _close(engine: Engine, report: Report) -> None:
    if not engine.alive:
        report.problems.append("an engine died")
    try:
        engine.close()
        engine.check_integrity()
    except Exception as error:
        report.problems.append(f"{type(error).__name__}: {error}")


def _questions(config: EngineConfig, seed: int) -> list[Question]:
    """Random prompts, answered one after another on one instance."""
    chance = random.Random(seed)
    prompts = [
        tuple(chance.randrange(512) for _ in range(chance.choice([3, 20, 60, 120, 180])))
        for _ in range(PROMPTS)
    ]
    alone = EngineConfig(
        pool=config.pool,
        max_model_len=config.max_model_len,
        max_chunk_tokens=config.max_chunk_tokens,
        program_dir=config.program_dir,
    )
    with build_engine(MODEL, alone).engine as engine:
        found = []
        for number, prompt in enumerate(prompts):
            answer, reason = _listen(_ask(engine, f"question-{number}", prompt, 40), HANG_S)
            if reason != "length":
                raise StepError(f"a single instance has no answer to question {number}: {reason}")
            found.append(Question(prompt=prompt, answer=answer))
    return found


def _ask(engine: Engine, name: str, prompt: tuple[int, ...], tokens: int) -> RequestHandle:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return engine.submit(GenerationRequest(id=name, token_ids=prompt, params=params))


def _listen(handle: RequestHandle, patience: float) -> tuple[tuple[int, ...], str]:
    """What it said, and why it ended; `hung` if it did not."""
    tokens: list[int] = []
    while True:
        try:
            event = handle.get(timeout=patience)
        except TimeoutError:
            return tuple(tokens), "hung"
        if isinstance(event, FinishedEvent):
            return tuple(tokens), event.reason
        assert isinstance(event, TokensEvent)
        tokens += event.token_ids


def _drive(
    engine: Engine,
    questions: Sequence[Question],
    seconds: float,
    seed: int,
    hang_s: float,
    counts: Counter[str],
) -> None:
    """Keeps requests open until the time is over; counts how they ended."""
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    asked: list[tuple[Question, int, RequestHandle]] = []
    number = 0
    while asked or time.monotonic() < end:
        while len(asked) < OPEN and time.monotonic() < end:
            question, tokens = chance.choice(questions), chance.randint(1, 40)
            asked.append(
                (question, tokens, _ask(engine, f"r{seed}-{number}", question.prompt, tokens))
            )
            number += 1
        if chance.random() < 0.1:
            chance.choice(asked)[2].abort()
        question, tokens, handle = asked.pop(chance.randrange(len(asked)))
        said, reason = _listen(handle, hang_s)
        counts[reason] += 1
        wanted = question.answer[: tokens if reason == "length" else len(said)]
        counts["differing"] += said != wanted
        if reason == "hung":
            break


def _warm_up(engine: Engine, questions: Sequence[Question], seed: int, hang_s: float) -> None:
    """Serves until nothing new had to be compiled for a while."""
    for round_ in range(100):
        before = engine.stats().programs.compiled
        counts: Counter[str] = Counter()
        _drive(engine, questions, 2.0, seed + round_, hang_s, counts)
        if counts["hung"]:
            return
        if round_ and engine.stats().programs.compiled == before:
            return


def _wait_until_empty(engine: Engine, patience: float) -> None:
    """What was aborted is free when the steps that worked on it have ended."""
    end = time.monotonic() + patience
    while any(view.used for view in engine.stats().instances) and time.monotonic() < end:
        time.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a soak and prints what it saw; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description="Random regrouping on emulated instances: hangs, leaks, wrong answers?"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to send requests")
    parser.add_argument("--instances", type=int, default=4, help="elastic instances (default 4)")
    parser.add_argument("--engines", type=int, default=1, help="engines on the same devices")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the end of it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = soak(
                seconds=options.seconds,
                instances=options.instances,
                seed=options.seed,
                engines=options.engines,
                program_dir=Path(folder) / "programs",
                picture=options.picture,
            )
        except LoongJaxError as error:
            print(f"soak: {error}", file=sys.stderr)
            return 2 if isinstance(error, UserError) else 1
    _show(report, as_json=options.json)
    if report.hung:  # an exit would wait for engines that do not end
        os._exit(1)
    return 0 if report.passed else 1


def _show(report: Report, *, as_json: bool) -> None:
    found = {"passed": report.passed, **asdict(report)}
    if as_json:
        print(json.dumps(found), flush=True)
    else:
        for name, value in found.items():
            print(f"{name:>14}  {value}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
