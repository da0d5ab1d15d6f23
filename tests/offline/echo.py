"""A backend that answers by itself, and runs with it that are killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from loongjax.api.outputs import CompletionOutput
from loongjax.errors import LoongJaxError, RequestError
from loongjax.offline.backend import LineFailedError
from loongjax.offline.job import Job, JobReport
from loongjax.offline.native import NativeFormat
from loongjax.offline.output import Output
from loongjax.offline.progress import Status
from loongjax.offline.records import open_records
from loongjax.offline.task import Answer
from loongjax.sampling.params import SamplingParams


class Echo:
    """Answers a text with itself, after a moment; some texts are trouble.

    Attributes:
      asked: What it was asked, in order.
      at_once: The most that it had in work.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.asked: list = []
        self.at_once = 0
        self._open = 0
        self._delay_s = delay_s

    @property
    def generated_tokens(self) -> int:
        return len(self.asked)

    def degrees(self) -> tuple[int, ...]:
        return (2, 1, 1)

    async def answer(self, prompt, params: SamplingParams) -> Answer:
        self.asked.append((prompt, params))
        self._open += 1
        self.at_once = max(self.at_once, self._open)
        try:
            await asyncio.sleep(self._delay_s * random.random())
        finally:
            self._open -= 1
        text = prompt if isinstance(prompt, str) else self._said(prompt)
        if text == "refuse":
            raise RequestError("refused")
        if text == "fail":
            raise LineFailedError("a step failed")
        if text == "die":
            raise LoongJaxError("the engine died")
        completions = tuple(
            CompletionOutput(
                index=i, token_ids=(*text.encode(),), text=text + i * "'", finish_reason="stop"
            )
            for i in range(params.n)
        )
        return Answer(prompt_tokens=len(text), completions=completions)

    def _said(self, prompt) -> str:
        if prompt and isinstance(prompt[0], Mapping):
            return prompt[-1]["content"]
        return bytes(prompt).decode()


class Silence:
    """Progress for nobody; remembers what it was told last."""

    last: Status

    def show(self, status: Status) -> None:
        self.last = status


def run_native(
    source: Path,
    target: Path,
    backend: Echo,
    *,
    overwrite: bool = False,
    in_flight: int = 512,
    order: str = "policy",
    **form,
) -> JobReport:
    """One run of a native job."""
    form = NativeFormat(defaults=form.pop("defaults", SamplingParams()), **form)
    with Output(target, form, overwrite=overwrite) as output:
        job = Job(
            source=open_records(source), output=output, form=form, in_flight=in_flight, order=order
        )
        return asyncio.run(job.run(backend, Silence()))


def run_and_kill(source: Path, target: Path, kills: int) -> list[int]:
    """Begins a run so many times and kills it; gives how long the output was then [bytes].

    Forks, so that a run begins at once: only for processes without threads.
    """
    draw = random.Random(0)
    sizes: list[int] = []
    for round_ in range(kills):
        child = os.fork()
        if child == 0:
            run_native(source, target, Echo(delay_s=0.02), in_flight=8)
            os._exit(0)
        end = time.monotonic() + 10
        while round_ % 4 and _size(target) <= max(sizes) and time.monotonic() < end:
            time.sleep(0.001)  # most runs are to have done something, however busy the machine
        time.sleep(draw.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it had ended before it was killed"
        sizes.append(_size(target))
    return sizes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    print(run_and_kill(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
