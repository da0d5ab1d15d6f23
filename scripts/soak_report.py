"""What a soak saw, and what an engine's records tell of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from loongjax.engine import Engine, StepRecord


@dataclass(kw_only=True)
class Report:
    """What a soak saw.

    Attributes:
      seconds: How long requests were sent.
      requests: Ended requests by reason.
      differing: Answers that differ from those of a single instance.
      hung: Requests without an end.
      slots_left: KV slots in use at the end.
      steps: By kind and degree, as `kind-degree`, warm-up included; failed ones as `failed`.
      groups: Different groups that ran something.
      changes: Times that an instance ran a step on another group than the one before.
      side_by_side: Steps that ran while a step of another group did.
      scale_ups, scale_downs: Times that a request's next step had a higher or lower degree.
      moved_tokens: By migrations.
      preemptions: As the engine counts them.
      problems: What ended an engine or a client of it, and what is wrong with a pool's books.
    """

    seconds: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    differing: int = 0
    hung: int = 0
    slots_left: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    groups: int = 0
    changes: int = 0
    side_by_side: int = 0
    scale_ups: int = 0
    scale_downs: int = 0
    moved_tokens: int = 0
    preemptions: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there were answers, and nothing went wrong."""
        failed = self.requests.get("error", 0) + self.steps.get("failed", 0)
        wrong = self.differing + self.hung + self.slots_left + failed + len(self.problems)
        return not wrong and self.requests.get("length", 0) > 0


def look_back(engine: Engine, report: Report) -> None:
    """Adds what an engine's records tell."""
    stats, records = engine.stats(), engine.steps()
    report.slots_left += sum(instance.used for instance in stats.instances)
    report.preemptions += stats.preemptions
    steps = Counter(report.steps)
    for count in stats.steps:
        steps[f"{count.kind}-{count.degree}"] += count.count
    if stats.failed_steps:
        steps["failed"] += stats.failed_steps
    report.steps = dict(sorted(steps.items()))
    report.groups = max(report.groups, len({record.group for record in records}))
    report.moved_tokens += sum(record.tokens for record in records if record.kind == "migrate")
    by_start = sorted(records, key=lambda record: record.started)
    report.side_by_side += _side_by_side(by_start)
    on: dict[int, tuple[int, ...]] = {}
    degree: dict[str, int] = {}
    for record in by_start:
        for instance in record.group:
            report.changes += on.get(instance, record.group) != record.group
            on[instance] = record.group
        for name in record.requests if record.kind != "migrate" else ():
            before = degree.get(name, record.degree)
            report.scale_ups += record.degree > before
            report.scale_downs += record.degree < before
            degree[name] = record.degree


def _side_by_side(by_start: Sequence[StepRecord]) -> int:
    """Steps that began while a step of another group ran."""
    running: list[StepRecord] = []
    found = 0
    for record in by_start:
        running = [other for other in running if other.ended > record.started]
        found += any(other.group != record.group for other in running)
        running.append(record)
    return found
