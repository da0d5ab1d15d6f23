"""`loongjax bench offline`: one file of prompts, answered by the command and by other engines.

Owns the file and the report. Each engine is a program that reads the file, writes a line for each
of its lines, and prints `{"seconds": …}` as its last line: from the first line read to the last one
written, when all is loaded and compiled. They run one at a time, on the same cores.
"""

from __future__ import annotations

import json
import logging
import random
import string
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from loongjax.bench.checkpoint import export_random
from loongjax.bench.cores import first_cores
from loongjax.bench.peers import PEERS
from loongjax.bench.process import clean_environment, own_python
from loongjax.errors import BenchError, ConfigError

COMMAND = "loongjax generate"
API = "LLM.generate"
VLLM = next(peer for peer in PEERS if peer.subject == "vllm")
_MODEL = "bench58m"
_CORES = 2
_SHORT_PROMPT = (32, 256)
_SHORT_ANSWER = (16, 32)
_LONG_ANSWER = 16
_CHARACTERS = string.ascii_letters + string.digits + " "
_SUBJECTS = Path(__file__).parent / "subjects"

_log = logging.getLogger(__name__)

Answers: TypeAlias = Mapping[int, tuple[int, ...]]
"""The token ids of each line's answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What every engine has to answer.

    Attributes:
      short: Lines of 32 to 256 prompt tokens, answered with 16 to 32.
      long: Lines among them that are answered with 16.
      long_tokens: Prompt tokens of those.
      dtype: Of all engines.
    """

    short: int = 10_000
    long: int = 20
    long_tokens: int = 30_000
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.short < 0 or self.long < 0 or not self.short + self.long:
            raise ConfigError("--short and --long must be numbers of lines, and not both 0")
        if self.long_tokens < 1:
            raise ConfigError(f"--long-tokens must be at least 1, not {self.long_tokens}")

    def lines(self) -> list[dict[str, Any]]:
        """The lines, always the same ones. A character is a token, as in all random models."""
        draw = random.Random(0)
        sizes = [
            (draw.randint(*_SHORT_PROMPT), draw.randint(*_SHORT_ANSWER)) for _ in range(self.short)
        ]
        sizes += [(self.long_tokens, _LONG_ANSWER)] * self.long
        draw.shuffle(sizes)
        return [
            {
                "prompt": "".join(draw.choices(_CHARACTERS, k=prompt)),
                "max_tokens": answer,
                "ignore_eos": True,
            }
            for prompt, answer in sizes
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One run of an engine: its time, and what it took to start and end [s]."""

    seconds: float
    start_s: float
    answers: Answers


@first_cores(_CORES)
def run_offline_bench(folder: Path, work: Work, rounds: int) -> dict[str, Any]:
    """Lets every engine answer the file `rounds` times, in turns; returns the report.

    vLLM takes part if it is installed in `folder`. Raises ConfigError for no rounds, BenchError
    where an engine fails or leaves something out.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, not {rounds}")
    lines = work.lines()
    with tempfile.TemporaryDirectory(prefix="loongjax-bench-") as place:
        source = Path(place) / "in.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        engines = _engines(folder, work, source)
        runs: dict[str, list[_Run]] = {name: [] for name in engines}
        for turn in range(rounds):
            names = list(engines)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                target = Path(place) / f"{turn}.jsonl"
                runs[name].append(_run(name, [*engines[name], str(target)], target, lines))
                target.unlink()
    return _describe(work, lines, runs)


def _describe(
    work: Work, lines: Sequence[Mapping[str, Any]], runs: Mapping[str, Sequence[_Run]]
) -> dict[str, Any]:
    """The report; the rates are over the median of the times."""
    prompt_tokens = sum(len(line["prompt"]) for line in lines)
    output_tokens = sum(line["max_tokens"] for line in lines)
    seconds = {name: median(run.seconds for run in found) for name, found in runs.items()}
    said = runs[COMMAND][0].answers
    return {
        "dtype": work.dtype,
        "lines": len(lines),
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "engines": {
            name: {
                "seconds": seconds[name],
                "start_s": median(run.start_s for run in found),
                "prompt_tokens_per_s": prompt_tokens / seconds[name],
                "output_tokens_per_s": output_tokens / seconds[name],
                "lines_agree": sum(found[0].answers[line] == said[line] for line in said),
            }
            for name, found in runs.items()
        },
        "ratios": {name: seconds[name] / seconds[COMMAND] for name in runs if name != COMMAND},
    }


def _engines(folder: Path, work: Work, source: Path) -> dict[str, list[str]]:
    """How each engine is started, but for the file of answers."""
    ours, model = [str(own_python()), "-P"], f"random:{_MODEL}"
    generate = ["generate", "--model", model, "--dtype", work.dtype, "--warm-up", "--json"]
    settings: dict[str, object] = {"model": model, "dtype": work.dtype}
    engines = {
        COMMAND: [*ours, "-m", "loongjax.cli.main", *generate, "--input", str(source), "--output"],
        API: [*ours, str(_SUBJECTS / "llm.py"), json.dumps(settings), str(source)],
    }
    if not VLLM.is_installed(folder):
        _log.warning("%s is not installed in %s and not measured", VLLM.name, folder)
        return engines
    checkpoint = folder / "checkpoints" / _MODEL
    export_random(_MODEL, checkpoint)
    settings |= {
        "model": str(checkpoint),
        "threads": _CORES,
        "max_len": max(work.long_tokens, _SHORT_PROMPT[1]) + _SHORT_ANSWER[1],
    }
    script = str(_SUBJECTS / f"{VLLM.subject}.py")
    engines[VLLM.name] = [
        *(str(VLLM.python(folder)), "-P"),
        *(script, json.dumps(settings), str(source)),
    ]
    return engines


def _run(
    name: str, command: Sequence[str], target: Path, lines: Sequence[Mapping[str, Any]]
) -> _Run:
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    whole = time.monotonic() - began
    if done.returncode:
        raise BenchError(f"{name} failed. Its last words:\n{done.stderr[-2000:]}")
    seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
    _log.info("%s: %.1f s, and %.1f s to start and end", name, seconds, whole - seconds)
    answers = _read_answers(target)
    wanted = {number: line["max_tokens"] for number, line in enumerate(lines, start=1)}
    if {number: len(said) for number, said in answers.items()} != wanted:
        raise BenchError(f"{name} did not answer every line with as many tokens as it asks for")
    return _Run(seconds=seconds, start_s=whole - seconds, answers=answers)


def _read_answers(target: Path) -> Answers:
    with target.open() as stream:
        written = [json.loads(line) for line in stream]
    return {line["line"]: tuple(line.get("token_ids", ())) for line in written}
