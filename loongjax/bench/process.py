"""A worker process from the outside: start it, give it jobs, end it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from loongjax.errors import BenchError

_WORKER = Path(__file__).parent / "worker.py"
_SUBJECTS = Path(__file__).parent / "subjects"
_START_S = 600.0
_JOB_S = 900.0
_LAST_LINES = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What a worker measured of one job; see `loongjax.bench.worker`.

    Attributes:
      first_s, first_cpu_s: Until every prompt had its first token: wall clock, CPU time.
      window_s, window_cpu_s: From there until the first answer was whole.
      window_tokens: Tokens that came in between, of all prompts.
      first_tokens: The first token of each answer.
    """

    first_s: float
    first_cpu_s: float
    window_s: float
    window_cpu_s: float
    window_tokens: int
    first_tokens: tuple[int, ...]


class Worker:
    """One engine in a process of its own. Use it as a context manager."""

    def __init__(
        self, name: str, *, python: Path, subject: str, settings: Mapping[str, object]
    ) -> None:
        """Starts `python` on `subjects/SUBJECT.py`; `ready` waits until it has loaded.

        Raises BenchError if the process cannot be started.
        """
        self.name = name
        script = _SUBJECTS / f"{subject}.py"
        command = [str(python), "-P", str(_WORKER), str(script), json.dumps(settings)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=clean_environment(),
            )
        except OSError as error:
            raise BenchError(f"{name}: cannot start {python}: {error}") from error
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._said: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_answers, daemon=True),
            threading.Thread(target=self._read_log, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def ready(self) -> None:
        """Waits until the engine has loaded. Raises BenchError if it does not."""
        self._answer(_START_S)

    def measure(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timing:
        """Runs one job. Raises BenchError if it fails or takes minutes."""
        answer = self._ask({"prompts": prompts, "tokens": tokens})
        return Timing(**answer | {"first_tokens": tuple(answer["first_tokens"])})

    def warmed(self) -> None:
        """Tells it that every kind of job ran once."""
        self._ask({"warmed": True})

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, job: Mapping[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("it ended") from None
        return self._answer(_JOB_S)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            raise self._failure(f"it gave no answer in {limit_s:.0f} s") from None
        if not line:
            self._answers.put(line)
            raise self._failure("it ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failure(answer["error"])
        return answer

    def _failure(self, what: str) -> BenchError:
        return BenchError(f"{self.name}: {what}. Its last words:\n" + "".join(self._said))

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._readers[1].join()  # so that the last words are whole when the end is known
        self._answers.put("")

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            _log.debug("%s: %s", self.name, line.rstrip())
            self._said = [*self._said, line][-_LAST_LINES:]


def own_python() -> Path:
    """The interpreter that runs this."""
    return Path(sys.executable)


def clean_environment() -> dict[str, str]:
    """The environment of this process, without what would lead a peer to our packages."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
