"""A job: every record of an input that has no line of output yet is answered and written.

Owns which lines are in work, how many, and in which order they begin. Lines are written in the
order in which they end.

Memory: the prompts in work (`in_flight`), the number of every line done, and, where the longest
go first, all records.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loongjax.errors import ConfigError, RequestError
from loongjax.offline.backend import Backend, LineFailedError
from loongjax.offline.output import Output
from loongjax.offline.progress import Progress, Status
from loongjax.offline.records import Record, RecordFile
from loongjax.offline.task import Format

Order: TypeAlias = Literal["policy", "longest"]
"""`policy`: as they stand in the file, and the engine's policy decides. `longest`: the longest
first, so that none of them runs alone at the end."""

_STATUS_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobReport:
    """What a run came to.

    Attributes:
      lines: Records of the input.
      resumed: Those that an earlier run had done.
      answered: Answers written by this run.
      errors: Lines of output that are errors, from all runs.
      failed: Lines left without a line of output: the next run tries them again.
      failure: Why the first of them failed, or None.
      prompt_tokens, generated_tokens: Of the answers that this run wrote.
      seconds: From the first record to the last answer of this run [s].
    """

    lines: int
    resumed: int
    answered: int
    errors: int
    failed: int
    failure: str | None
    prompt_tokens: int
    generated_tokens: int
    seconds: float


class Job:
    """One run over an input. To be run once."""

    def __init__(
        self,
        *,
        source: RecordFile,
        output: Output,
        form: Format,
        order: Order = "policy",
        in_flight: int = 512,
    ) -> None:
        """Looks through the input and compares it with what is done.

        Raises:
          ConfigError: The output answers another input, `in_flight` is below 1, or the input
            cannot be read.
        """
        if in_flight < 1:
            raise ConfigError(f"in_flight must be at least 1, not {in_flight}")
        self._source, self._output, self._form = source, output, form
        self._order, self._in_flight = order, in_flight
        self._lines = self._survey()
        self._resumed = len(output.done)
        self._answered = self._prompt_tokens = self._generated_tokens = 0
        self._failures: list[str] = []

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return len(self._output.done) == self._lines

    async def run(self, backend: Backend, progress: Progress) -> JobReport:
        """Answers what is left. Whatever stops it, what was written stays done.

        Raises:
          LoongJaxError: What all further lines would fail of.
        """
        began = time.monotonic()
        watch = asyncio.create_task(self._watch(backend, progress))
        turns = asyncio.Semaphore(self._in_flight)
        try:
            async with asyncio.TaskGroup() as group:
                for record in self._records():
                    await turns.acquire()
                    working = group.create_task(self._work(record, backend))
                    working.add_done_callback(lambda _: turns.release())
                    await asyncio.sleep(0)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            watch.cancel()
            self._show(backend, progress)
        return self.report(time.monotonic() - began)

    def report(self, seconds: float = 0.0) -> JobReport:
        """What it came to."""
        return JobReport(
            lines=self._lines,
            resumed=self._resumed,
            answered=self._answered,
            errors=self._output.errors,
            failed=len(self._failures),
            failure=self._failures[0] if self._failures else None,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            seconds=seconds,
        )

    def _survey(self) -> int:
        """Counts the records, and finds each line of output among them."""
        lines, unseen = 0, set(self._output.done)
        for record in self._source.records():
            lines += 1
            if record.line in unseen:
                unseen.remove(record.line)
                said, name = self._output.done[record.line], self._form.name(record)
                if said is not None and said != name:
                    raise ConfigError(
                        f"{self._output.path} answers another input: its line {record.line} is "
                        f"called {said!r} there and {name!r} in {self._source.path}; choose "
                        "another output, or give --overwrite"
                    )
        if unseen:
            raise ConfigError(
                f"{self._output.path} answers another input: {self._source.path} has no record at "
                f"line {min(unseen)}; choose another output, or give --overwrite"
            )
        return lines

    def _records(self) -> Iterator[Record]:
        done = frozenset(self._output.done)
        left = (record for record in self._source.records() if record.line not in done)
        if self._order == "longest":
            return iter(sorted(left, key=lambda record: -record.size))
        return left

    async def _work(self, record: Record, backend: Backend) -> None:
        try:
            if record.error is not None:
                raise RequestError(record.error)
            task = self._form.read(record)
            answer = await backend.answer(task.prompt, task.params)
        except RequestError as error:
            self._output.append(self._form.refused(record, str(error)))
        except LineFailedError as error:
            if not self._failures:
                _log.warning("line %d failed: %s", record.line, error)
            self._failures.append(str(error))
        else:
            self._output.append(self._form.answered(task, answer))
            self._answered += 1
            self._prompt_tokens += answer.prompt_tokens
            self._generated_tokens += sum(len(each.token_ids) for each in answer.completions)

    async def _watch(self, backend: Backend, progress: Progress) -> None:
        while True:
            self._show(backend, progress)
            await asyncio.sleep(_STATUS_S)

    def _show(self, backend: Backend, progress: Progress) -> None:
        progress.show(
            Status(
                done=len(self._output.done) + len(self._failures),
                errors=self._output.errors,
                generated_tokens=backend.generated_tokens,
                degrees=backend.degrees(),
            )
        )
