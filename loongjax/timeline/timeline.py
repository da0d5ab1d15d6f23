"""`Timeline`: what ran where and when, frozen, to be drawn, saved or read.

Made of the records that an engine keeps, or of step records alone, so that whatever runs
steps can show them. Knows nothing of jax; matplotlib is loaded by `plot` alone.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from loongjax.engine import Engine
from loongjax.engine.messages import PoolSample, RequestRecord, StepKind, StepRecord
from loongjax.errors import UserError
from loongjax.plan import Group, InstanceId, RequestId
from loongjax.timeline.explain import explain
from loongjax.timeline.runs import plural, spans_of
from loongjax.timeline.trace import write_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Timeline:
    """What a cluster did. Shown as a picture where a notebook's cell ends with it.

        timeline = llm.timeline()
        timeline.plot("steps.png")
        timeline.between(1.5, 2.0).save_trace("steps.json")

    Attributes:
      steps: The steps, in the order in which they were launched.
      instances: How many elastic instances there are.
      pool_slots: KV slots of each; None: unknown.
      pool: Changes of the KV in use, by time; empty: unknown.
      requests: The requests that ran, by arrival; empty: unknown.
      zero: When its time 0 is: the launch of the first step [s, engine clock]; before any
        has ended, whatever else came first.
      groups: Every group in order of its first step, which gives it its colour.
      bounds: The part that is shown, from and to [s since `zero`].
    """

    steps: tuple[StepRecord, ...]
    instances: int
    pool_slots: int | None
    pool: tuple[PoolSample, ...]
    requests: tuple[RequestRecord, ...]
    zero: float
    groups: tuple[Group, ...]
    bounds: tuple[float, float]

    @classmethod
    def from_steps(
        cls,
        steps: Iterable[StepRecord],
        *,
        instances: int | None = None,
        pool_slots: int | None = None,
        pool: Iterable[PoolSample] = (),
        requests: Iterable[RequestRecord] = (),
    ) -> Timeline:
        """A timeline of steps, and of whatever else is known.

        Args:
          steps: In any order. Without any there is nothing to see, which is no error.
          instances: How many there are; None: up to the last one that a step names.
          pool_slots: KV slots of each instance.
          pool: Changes of the KV in use, by time.
          requests: Those that ended before the first step are left out.
        """
        ordered = tuple(sorted(steps, key=lambda step: (step.started, step.seq)))
        pool, requests = tuple(pool), tuple(requests)
        others = (*(sample.time for sample in pool[:1]), *(r.arrival for r in requests))
        zero = ordered[0].started if ordered else min(others, default=0.0)
        samples = _samples_between(pool, zero, math.inf)
        ends = (*(step.ended for step in ordered), *(sample.time for sample in samples[-1:]))
        named = 1 + max((step.group[-1] for step in ordered), default=-1)
        return cls(
            steps=ordered,
            instances=named if instances is None else instances,
            pool_slots=pool_slots,
            pool=samples,
            requests=tuple(
                sorted(
                    (r for r in requests if r.end is None or r.end >= zero),
                    key=lambda request: request.arrival,
                )
            ),
            zero=zero,
            groups=tuple(dict.fromkeys(step.group for step in ordered)),
            bounds=(0.0, max(ends, default=zero) - zero),
        )

    @classmethod
    def of_engine(cls, engine: Engine) -> Timeline:
        """What an engine did, as far back as it keeps records."""
        instances = engine.stats().instances
        return cls.from_steps(
            engine.steps(),
            instances=len(instances),
            pool_slots=instances[0].slots,
            pool=engine.pool_samples(),
            requests=engine.requests(),
        )

    def between(self, begin: float, end: float | None = None) -> Timeline:
        """A part of it: what touches `begin` to `end`, in seconds on the same axis.

        Use it to look closer, or to leave out the first steps, whose programs were compiled.
        Time 0 and the colours of groups stay as they are. `end` None: to the last.

        Raises:
          UserError: `end` is not after `begin`.
        """
        if end is None:
            end = max(self.bounds[1], begin)
        elif end <= begin:
            raise UserError(
                f"a timeline between {begin} s and {end} s is empty: give an end after the "
                f"begin; this one has {self.bounds[0]:.3f} s to {self.bounds[1]:.3f} s"
            )
        first, last = self.zero + begin, self.zero + end
        return replace(
            self,
            steps=tuple(s for s in self.steps if s.started <= last and s.ended >= first),
            pool=_samples_between(self.pool, first, last),
            requests=tuple(
                r for r in self.requests if r.arrival <= last and (r.end is None or r.end >= first)
            ),
            bounds=(begin, end),
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws it: who worked on what, and under it how full every instance's KV pool was.

        Args:
          path: Also saved there, in the format of its suffix (`.png`, `.svg`, `.pdf`).

        Returns:
          A matplotlib figure of its own, which pyplot knows nothing of.

        Raises:
          UserError: matplotlib is not installed.
        """
        try:
            from loongjax.timeline.plot import draw
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "matplotlib":
                raise
            raise UserError(
                "a plot needs matplotlib, which is not installed: "
                "pip install 'loongjax[notebook]'. `save_trace` works without it"
            ) from error
        figure = draw(self)
        if path is not None:
            figure.savefig(path)
        return figure

    def save_trace(self, path: str | Path) -> None:
        """Saves it as a trace (JSON) for https://ui.perfetto.dev or chrome://tracing.

        A track for each instance with its steps, a counter of KV slots for each, arrows from
        step to step of a request where it changes its group, and a track for each request.
        Times are microseconds since `zero`.
        """
        with Path(path).open("w", encoding="utf-8") as file:
            write_trace(self, file)

    def explain(self, request: RequestId) -> str:
        """Why it waited, why it ran where it did, and when: a line for each.

        How much its policy says of it depends on the policy; the last request of that name counts.

        Raises:
          UserError: No request of this timeline is called so.
        """
        record = next((r for r in reversed(self.requests) if r.id == request), None)
        if record is None:
            raise UserError(
                f"this timeline has no request {request!r}, but {len(self.requests):,} others"
                + (f", such as {self.requests[0].id!r}" if self.requests else "")
            )
        end = math.inf if record.end is None else record.end
        steps = [
            step
            for step in self.steps
            if request in step.requests and step.started <= end and step.ended >= record.arrival
        ]
        return "\n".join(explain(record, steps))

    @property
    def busy_share(self) -> float:
        """Time in steps, of the time that all instances had together; in [0, 1]."""
        first, last = self.bounds
        worked = sum(
            max(0.0, min(span.end, last) - max(span.begin, first)) * span.step.degree
            for span in spans_of(self.steps, self.zero)
        )
        total = (last - first) * self.instances
        return worked / total if total else 0.0

    def headline(self) -> str:
        """How long, how much, how busy: one line."""
        begin, end = self.bounds
        failed = sum(step.error is not None for step in self.steps)
        parts = [
            plural(self.instances, "instance"),
            f"{end - begin:.4g} s",
            plural(len(self.requests), "request") if self.requests else "",
            plural(len(self.steps), "step") + (f" ({failed:,} failed)" if failed else ""),
            f"instances busy {self.busy_share:.0%} of the time" if self.steps else "",
        ]
        return ", ".join(filter(None, parts))

    def _repr_png_(self) -> bytes | None:
        # No _repr_html_ beside it: notebooks would show that one instead of the picture.
        if find_spec("matplotlib") is None:
            return None  # a notebook shows the text then
        file = io.BytesIO()
        self.plot().savefig(file, format="png")
        return file.getvalue()

    def __str__(self) -> str:
        lines = [f"Timeline: {self.headline()}"]
        for kind in get_args(StepKind):
            done = [step for step in self.steps if step.kind == kind and step.error is None]
            if done:
                tokens = sum(step.tokens for step in done)
                degrees = sorted(Counter(step.degree for step in done).items())
                lines.append(
                    f"  {kind:8}{plural(len(done), 'step'):>14}{plural(tokens, 'token'):>18}, "
                    "by degree " + ", ".join(f"{degree}: {n:,}" for degree, n in degrees)
                )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Timeline: {self.headline()}>"


def _samples_between(
    samples: Iterable[PoolSample], first: float, last: float
) -> tuple[PoolSample, ...]:
    """The samples of a period; at its begin stands what holds then."""
    before: dict[InstanceId, PoolSample] = {}
    inside = []
    for sample in samples:
        if sample.time < first:
            before[sample.instance] = sample._replace(time=first)
        elif sample.time <= last:
            inside.append(sample)
    return (*sorted(before.values()), *inside)
