"""What a request lived through, in words: what its policy said of it, and the steps that it had."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from loongjax.engine.messages import RequestRecord, StepRecord
from loongjax.timeline.runs import plural

_WORDS = {"prefill": "step", "decode": "decode step", "migrate": "move"}


class _Event(NamedTuple):
    """At `time` [s since it came]; successive ones with the same `key` are told together."""

    time: float
    key: str
    end: float
    is_step: bool


def explain(request: RequestRecord, steps: Iterable[StepRecord]) -> list[str]:
    """Lines that tell a request's story, each with the time since it came [s].

    Args:
      request: With its decisions, as far as its policy gives any.
      steps: That worked on it, in order.
    """
    came = request.arrival
    lines = [
        f"{request.id} came at {came:.3f} s with {plural(request.prompt, 'token')} and "
        f"generated {request.generated:,}"
    ]
    events = [_Event(d.time - came, d.text, d.time - came, False) for d in request.decisions]
    for step in steps:
        where = ", ".join(map(str, step.group))
        failed = "" if step.error is None else f", which failed: {step.error}"
        text = f"{_WORDS[step.kind]} on {where}{failed}"
        events.append(_Event(step.started - came, text, step.ended - came, True))
    events.sort(key=lambda event: (event.time, event.is_step))
    for (text, is_step), same in groupby(events, key=lambda event: (event.key, event.is_step)):
        run = list(same)
        if is_step:
            count = f"{len(run):,} x " if len(run) > 1 else ""
            text = f"  {count}{text}, {run[-1].end - run[0].time:.3f} s"
        lines.append(f"{run[0].time:+9.3f}  {text}")
    if request.end is not None:
        lines.append(f"{request.end - came:+9.3f}  ended: {request.reason}")
    return lines
