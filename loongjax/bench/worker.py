"""A process that holds one engine and times it: the same stopwatch for loongjax and its peers.

    python -P worker.py SUBJECT.py SETTINGS

Runs in the virtual environment of whatever it measures, so it knows the standard library
alone and is started by its path. It loads the module SUBJECT.py, calls `load(settings)` there
with the JSON object SETTINGS, and then answers one JSON line on stdin with one on stdout.
What libraries print goes to stderr.

A job `{"prompts": [[id, …], …], "tokens": n}` is answered with

    {"first_s", "first_cpu_s": until every prompt has its first token,
     "window_s", "window_cpu_s", "window_tokens": from there until the first answer is whole,
     "first_tokens": [id, …]}

cpu_s is user and system time of this process, all threads. The job `{"warmed": true}` says
that warm-up is over; an error is answered with `{"error": text}`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias, runtime_checkable

Tokens: TypeAlias = Iterable[tuple[int, int]]
"""Tokens that came together, each as (number of the prompt, token id)."""


@runtime_checkable
class Subject(Protocol):
    """An engine under measurement: greedy, deaf to end tokens, nothing kept between jobs."""

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Iterable[Tokens]:
        """Answers all prompts together with `tokens` tokens each.

        Yields what came as soon as it is on the host. Reaching the end of an answer does not
        end the others.
        """
        ...

    def warmed(self) -> None:
        """Every kind of job ran once. To compile anything in a later job is an error."""
        ...


@dataclass(frozen=True)
class _Moment:
    """Now: wall clock, and CPU time of this process [s]."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> _Moment:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.perf_counter(), used.ru_utime + used.ru_stime)


def measure(subject: Subject, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """Runs one job and times it; see the module. Raises ValueError if tokens are missing."""
    counts = [0] * len(prompts)
    first_tokens = [-1] * len(prompts)
    began = _Moment.now()
    first = end = None
    for came in subject.generate(prompts, tokens):
        now = _Moment.now()
        for number, token in came:
            if not counts[number]:
                first_tokens[number] = token
            counts[number] += 1
        if first is None and min(counts):
            first, before = now, sum(counts)
        if end is None and max(counts) == tokens:
            end, after = now, sum(counts)
    if first is None or end is None or counts != [tokens] * len(prompts):
        raise ValueError(f"{tokens} tokens were asked for each prompt, {counts} came")
    if len(prompts) > 1 and tokens > 1 and end.wall <= first.wall:
        raise ValueError("the first answer was whole before the last one began: give more tokens")
    return {
        "first_s": first.wall - began.wall,
        "first_cpu_s": first.cpu - began.cpu,
        "window_s": max(0.0, end.wall - first.wall),
        "window_cpu_s": max(0.0, end.cpu - first.cpu),
        "window_tokens": max(0, after - before),
        "first_tokens": first_tokens,
    }


def serve(subject: Subject, jobs: Iterable[str], answers: TextIO) -> None:
    """Answers jobs until there are none."""
    for line in jobs:
        try:
            job = json.loads(line)
            if "warmed" in job:
                subject.warmed()
                answer: dict[str, Any] = {}
            else:
                answer = measure(subject, job["prompts"], job["tokens"])
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _load(path: Path, settings: dict[str, Any]) -> Subject:
    spec = importlib.util.spec_from_file_location(f"subject_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    subject: Subject = module.load(settings)
    return subject


def main() -> None:
    """Loads the subject, says `{}`, and serves."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    subject = _load(Path(sys.argv[1]), json.loads(sys.argv[2]))
    print("{}", file=answers, flush=True)
    serve(subject, sys.stdin, answers)


if __name__ == "__main__":
    main()
