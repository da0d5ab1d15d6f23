"""Traces: requests with their times, read from files.

Three formats, told apart by their first line; any of them may be gzipped.

- CSV of the Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens`.
- JSON lines of the Mooncake traces: `timestamp` [ms], `input_length`, `output_length`;
  `hash_ids`, which say what prompts share, are not used yet.
- JSON lines of this project: `arrival_s`, `prompt_tokens`, `output_tokens`, and, where they
  are known, `id`, `max_tokens` and `cancel_after_s`.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from loongjax.errors import RequestError
from loongjax.simulator.jobs import Job


class _Line(NamedTuple):
    arrival: float
    prompt: int
    output: int
    name: str | None = None
    limit: int | None = None
    cancel_after: float | None = None


def read_trace(
    path: Path | str, *, count: int | None = None, limit: int | None = None
) -> list[Job]:
    """Reads the first requests of a trace, ordered by arrival; the first arrives at 0.

    Requests without tokens or without an answer are left out.

    Args:
      path: The file.
      count: At most so many requests; None: all.
      limit: `max_tokens` of requests whose trace does not tell it; never less than what the
        answer takes. None: the longest answer of the trace.

    Raises:
      RequestError: The file cannot be read, is in none of the formats, or holds no request.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the trace {path}: {error}") from error
    lines = list(_parse(path, [line for line in text.splitlines() if line.strip()]))
    lines = sorted((line for line in lines if line.prompt and line.output), key=lambda x: x.arrival)
    lines = lines[:count]
    if not lines:
        raise RequestError(f"the trace {path} holds no request with a prompt and an answer")
    told = max(line.output for line in lines) if limit is None else limit
    first = lines[0].arrival
    return [
        Job(
            id=line.name or f"r{i}",
            arrival=line.arrival - first,
            prompt=line.prompt,
            output=line.output,
            limit=max(told if line.limit is None else line.limit, line.output),
            cancel_after=line.cancel_after,
        )
        for i, line in enumerate(lines)
    ]


def write_trace(path: Path | str, jobs: Iterable[Job]) -> None:
    """Writes jobs in this project's format."""
    with Path(path).open("w", encoding="utf-8") as file:
        for job in jobs:
            line: dict[str, Any] = {
                "id": job.id,
                "arrival_s": job.arrival,
                "prompt_tokens": job.prompt,
                "output_tokens": job.output,
                "max_tokens": job.limit,
            }
            if job.cancel_after is not None:
                line["cancel_after_s"] = job.cancel_after
            file.write(json.dumps(line) + "\n")


def _parse(path: Path, lines: Sequence[str]) -> Iterator[_Line]:
    """The lines, of whichever format; the error of a bad one names it."""
    azure = bool(lines) and lines[0].startswith("TIMESTAMP,")
    names = next(csv.reader(lines[:1])) if azure else []
    for number, line in enumerate(lines[int(azure) :], 1 + azure):
        try:
            if azure:
                yield _azure_line(dict(zip(names, next(csv.reader([line])), strict=True)))
            else:
                yield _json_line(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"line {number} of the trace {path} is in none of the known formats "
                f"({type(error).__name__}: {error}): Azure CSV with the columns TIMESTAMP, "
                "ContextTokens, GeneratedTokens; JSON lines with timestamp, input_length, "
                "output_length; or with arrival_s, prompt_tokens, output_tokens"
            ) from error


def _azure_line(item: dict[str, str]) -> _Line:
    arrival = _seconds(item["TIMESTAMP"])
    return _Line(arrival, int(item["ContextTokens"]), int(item["GeneratedTokens"]))


def _json_line(item: dict[str, Any]) -> _Line:
    if "timestamp" in item:
        arrival = float(item["timestamp"]) / 1000.0
        return _Line(arrival, int(item["input_length"]), int(item["output_length"]))
    return _Line(
        float(item["arrival_s"]),
        int(item["prompt_tokens"]),
        int(item["output_tokens"]),
        item.get("id"),
        item.get("max_tokens"),
        item.get("cancel_after_s"),
    )


def _seconds(timestamp: str) -> float:
    """Of an ISO time, whose fraction may have any number of digits."""
    whole, _, fraction = timestamp.partition(".")
    day = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return day.timestamp() + float(f"0.{fraction or 0}")
