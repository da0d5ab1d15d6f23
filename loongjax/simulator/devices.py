"""Instances that work on steps, on a virtual clock.

Owns what runs, and when it ends. Steps on one instance follow each other in the order of their
launches. Where instances share cores, `k` groups that work at once are each slower by
1 + crowding * (k - 1), with the mean `crowding` of their steps, from the moment when the others
begin until they end: processor sharing, kept as one count of the work that everybody who runs
has got so far.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from loongjax.plan import Group, InstanceId


@dataclass(kw_only=True, slots=True, eq=False)
class _Task:
    """A step: how long it works alone [s], how many it waits for, who waits for it."""

    seq: int
    group: Group
    seconds: float
    crowding: float
    started: float = 0.0
    blockers: int = 0
    behind: list[_Task] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A step that ended, and when it began and ended [s]."""

    seq: int
    started: float
    ended: float


class Devices:
    """See the module."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._work = 0.0  # what a step that ran from the beginning would have got so far [s]
        self._running: list[tuple[float, int, _Task]] = []  # by the work at which they end
        self._last: dict[InstanceId, _Task] = {}
        self._ended: list[Ended] = []

    @property
    def next_end(self) -> float | None:
        """When a step ends next [s], if nothing is launched before; None: nothing runs."""
        if self._ended:
            return self._ended[0].ended
        return self._end_of_first() if self._running else None

    def launch(
        self, now: float, seq: int, group: Group, seconds: float, crowding: float = 0.0
    ) -> None:
        """Runs a step as soon as what was launched on its group before has ended.

        `crowding` is the part of its time by which it and another one like it slow each other.
        """
        self._run_until(now)
        task = _Task(seq=seq, group=group, seconds=seconds, crowding=crowding)
        before = {id(t): t for i in group if (t := self._last.get(i)) is not None}
        for other in before.values():
            other.behind.append(task)
        task.blockers = len(before)
        self._last.update(dict.fromkeys(group, task))
        if not before:
            self._start(task)

    def advance(self, now: float) -> list[Ended]:
        """Time goes on; gives the steps that ended, in that order."""
        self._run_until(now)
        ended, self._ended = self._ended, []
        return ended

    def _run_until(self, now: float) -> None:
        now = max(now, self._clock)
        while self._running:
            end = self._end_of_first()
            if end > now:
                self._work += (now - self._clock) / self._slowness
                break
            self._work, _, task = heapq.heappop(self._running)
            self._clock = end
            self._finish(task)
        self._clock = now

    @property
    def _slowness(self) -> float:
        count = len(self._running)
        if count == 1:
            return 1.0
        return 1.0 + sum([task.crowding for _, _, task in self._running]) * (count - 1) / count

    def _end_of_first(self) -> float:
        return self._clock + (self._running[0][0] - self._work) * self._slowness

    def _start(self, task: _Task) -> None:
        task.started = self._clock
        heapq.heappush(self._running, (self._work + task.seconds, task.seq, task))

    def _finish(self, task: _Task) -> None:
        self._ended.append(Ended(seq=task.seq, started=task.started, ended=self._clock))
        for instance in task.group:
            if self._last[instance] is task:
                del self._last[instance]
        for other in task.behind:
            other.blockers -= 1
            if not other.blockers:
                self._start(other)
