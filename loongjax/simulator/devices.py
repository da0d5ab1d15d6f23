"""Instances that work on steps, on a virtual clock.

Owns what runs, and when it ends. Steps on one instance follow each other in the order of their
launches. Where instances share cores, a step is slower by its `Crowding` beside each other one
that runs, from the moment when that begins until it ends. So all steps of a kind go on equally
fast at any time: processor sharing, kept as one count for each kind of the work that everybody
of it who runs has got so far.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from loongjax.costmodel.sib import Crowding
from loongjax.plan import Group, InstanceId

_NEVER = math.inf


@dataclass(kw_only=True, slots=True, eq=False)
class _Lane:
    """Steps of one kind that run.

    Attributes:
      beside_own, beside_other: By what part of its time each of them is slower beside another one
        of its kind, and beside one of the other.
      running: By the work at which they end.
      work: What one that ran from the beginning would have got so far [s].
      slowness: Time that passes for each second of work.
      end: When the first of them ends, if none begins before; never, if there is none.
    """

    beside_own: float
    beside_other: float
    running: list[tuple[float, int, _Task]] = field(default_factory=list)
    work: float = 0.0
    slowness: float = 1.0
    end: float = _NEVER

    def share(self, now: float, others: int) -> None:
        """Others began or ended: so many of the other kind run now."""
        if not self.running:
            self.end = _NEVER
            return
        own = self.beside_own * (len(self.running) - 1)
        self.slowness = 1.0 + own + self.beside_other * others
        self.end = now + max(0.0, self.running[0][0] - self.work) * self.slowness


@dataclass(kw_only=True, slots=True, eq=False)
class _Task:
    """A step: how long it works alone [s], how many it waits for, who waits for it."""

    seq: int
    group: Group
    seconds: float
    lane: _Lane
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

    def __init__(self, crowding: Crowding) -> None:
        self._clock = 0.0  # of the last time when something began or ended
        self._prompts = _Lane(
            beside_own=crowding.prefill_prefill, beside_other=crowding.prefill_decode
        )
        self._decodes = _Lane(
            beside_own=crowding.decode_decode, beside_other=crowding.decode_prefill
        )
        self._first = self._prompts  # whose step ends next
        self._last: dict[InstanceId, _Task] = {}
        self._ended: list[Ended] = []

    @property
    def next_end(self) -> float | None:
        """When a step ends next [s], if nothing is launched before; None: nothing runs."""
        if self._ended:
            return self._ended[0].ended
        end = self._first.end
        return None if end == _NEVER else end

    def launch(
        self, now: float, seq: int, group: Group, seconds: float, *, is_prompt: bool
    ) -> None:
        """Runs a step as soon as what was launched on its group before has ended."""
        self._run_until(now)
        lane = self._prompts if is_prompt else self._decodes
        task = _Task(seq=seq, group=group, seconds=seconds, lane=lane)
        before = {id(t): t for i in group if (t := self._last.get(i)) is not None}
        for other in before.values():
            other.behind.append(task)
        task.blockers = len(before)
        self._last.update(dict.fromkeys(group, task))
        if not before:
            self._pass(max(now, self._clock))
            self._start(task)
            self._share()

    def advance(self, now: float) -> list[Ended]:
        """Time goes on; gives the steps that ended, in that order."""
        self._run_until(now)
        ended, self._ended = self._ended, []
        return ended

    def _run_until(self, now: float) -> None:
        while (lane := self._first).end <= now:
            self._pass(lane.end)
            lane.work, _, task = heapq.heappop(lane.running)
            self._finish(task)
            self._share()

    def _pass(self, now: float) -> None:
        passed = now - self._clock
        self._clock = now
        for lane in (self._prompts, self._decodes):
            if lane.running:
                lane.work += passed / lane.slowness

    def _share(self) -> None:
        prompts, decodes = self._prompts, self._decodes
        prompts.share(self._clock, len(decodes.running))
        decodes.share(self._clock, len(prompts.running))
        self._first = prompts if prompts.end <= decodes.end else decodes

    def _start(self, task: _Task) -> None:
        task.started = self._clock
        heapq.heappush(task.lane.running, (task.lane.work + task.seconds, task.seq, task))

    def _finish(self, task: _Task) -> None:
        self._ended.append(Ended(seq=task.seq, started=task.started, ended=self._clock))
        for instance in task.group:
            if self._last[instance] is task:
                del self._last[instance]
        for other in task.behind:
            other.blockers -= 1
            if not other.blockers:
                self._start(other)
