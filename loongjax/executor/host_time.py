"""Where the engine's thread spends its time, by phase.

One thread laps; any thread may read. A lap costs a call and a look at the clock (about 0.3 µs
together), and a step has about eight.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Phase: TypeAlias = Literal["planning", "tables", "launch", "call", "landing", "delivering"]
"""Planning: snapshot, policy, validation, continuing steps. Tables: slots, block tables and the
inputs of a step. Launch: all around the executable's call. Call: inside it. Landing: booking
what a step brought. Delivering: handing tokens to callers.
"""
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTime:
    """Seconds spent in a phase, in how many pieces."""

    phase: Phase
    seconds: float
    count: int


class HostTime:
    """A lap counter.

    Attributes:
      clock: Seconds: of the wall, or another one, such as `time.thread_time`, that does not
        count when others have the processor. To be changed while nothing runs.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._counts: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._last = clock()

    def begin(self) -> None:
        """What was before belongs to no phase: it was spent waiting."""
        self._last = self.clock()

    def lap(self, phase: Phase) -> None:
        """What passed since the last lap, or since `begin`, belongs to `phase`."""
        now = self.clock()
        self._seconds[phase] += now - self._last
        self._counts[phase] += 1
        self._last = now

    def seconds(self) -> dict[Phase, float]:
        """So far, by phase."""
        return dict(self._seconds)

    def times(self) -> tuple[PhaseTime, ...]:
        """So far, all phases in their order."""
        return tuple(
            PhaseTime(phase=phase, seconds=self._seconds[phase], count=self._counts[phase])
            for phase in PHASES
        )
