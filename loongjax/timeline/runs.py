"""Steps as spans of time on instances, and spans put together into runs.

Pure functions over `StepRecord`s. What a box of the picture or a slice of the trace covers is
decided here; how it looks is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from loongjax.engine.messages import StepKind, StepRecord
from loongjax.plan import Group, InstanceId


class Span(NamedTuple):
    """A step and when its group worked on it [s since the timeline's zero]."""

    step: StepRecord
    begin: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Successive steps that are shown as one: `spans` of one kind, on one group.

    Only decode steps that succeeded are ever put together; anything else is a run of one.
    """

    spans: tuple[Span, ...]

    @property
    def kind(self) -> StepKind:
        """Kind of all its steps."""
        return self.spans[0].step.kind

    @property
    def group(self) -> Group:
        """Who ran them."""
        return self.spans[0].step.group

    @property
    def begin(self) -> float:
        """When the first began."""
        return self.spans[0].begin

    @property
    def end(self) -> float:
        """When the last ended."""
        return self.spans[-1].end

    @property
    def failed(self) -> bool:
        """Whether its step failed."""
        return self.spans[0].step.error is not None

    @property
    def tokens(self) -> int:
        """Tokens of all its steps."""
        return sum(span.step.tokens for span in self.spans)

    @property
    def masters(self) -> frozenset[InstanceId]:
        """Every instance that was master in any of them."""
        return frozenset(master for span in self.spans for master in span.step.masters)


def spans_of(steps: Iterable[StepRecord], zero: float) -> list[Span]:
    """When each step had its group for itself, in order of `begin`.

    A step may be launched before its forerunner on the devices has ended. It waits for it
    then, and its span begins where the other's ends: spans of an instance never overlap.
    """
    free_at: dict[InstanceId, float] = {}
    spans = []
    for step in sorted(steps, key=lambda step: (step.started, step.seq)):
        begin = max(step.started - zero, *(free_at.get(i, 0.0) for i in step.group), 0.0)
        end = max(step.ended - zero, begin)
        free_at.update(dict.fromkeys(step.group, end))
        spans.append(Span(step, begin, end))
    spans.sort(key=lambda span: span.begin)  # stable: an instance's spans stay in order
    return spans


def runs_of(spans: Sequence[Span], idle_s: float) -> list[Run]:
    """Puts decode steps together that follow each other on one group; in order of `begin`.

    A run ends when another step, or a failed one, comes to any of its instances, and when its
    group rests for longer than `idle_s` and than its last step took. Requests may come and go
    within a run.
    """
    runs: list[list[Span]] = []
    newest: dict[InstanceId, int] = {}  # index of the last run on each instance
    for span in spans:
        group = span.step.group
        before = newest.get(group[0])
        if (
            before is not None
            and all(newest.get(i) == before for i in group)
            and _goes_on(runs[before][-1], span, idle_s)
        ):
            runs[before].append(span)
            continue
        newest.update(dict.fromkeys(group, len(runs)))
        runs.append([span])
    return [Run(spans=tuple(run)) for run in runs]


def _goes_on(last: Span, span: Span, idle_s: float) -> bool:
    pause = span.begin - last.end
    return (
        span.step.kind == last.step.kind == "decode"
        and span.step.group == last.step.group
        and span.step.error is None
        and last.step.error is None
        and pause <= max(idle_s, last.end - last.begin)
    )


def plural(number: int, word: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def row_pieces(group: Group) -> list[tuple[InstanceId, InstanceId]]:
    """A group as (first, last) of neighbouring instances: (0, 1, 3) is (0, 1), (3, 3)."""
    starts = [group[0], *(b for a, b in pairwise(group) if b != a + 1)]
    ends = [*(a for a, b in pairwise(group) if b != a + 1), group[-1]]
    return list(zip(starts, ends, strict=True))
