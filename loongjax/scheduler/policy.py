"""What every policy is: a pure function from a snapshot to a plan."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from loongjax.plan import Plan, Snapshot


@runtime_checkable
class Policy(Protocol):
    """Decides what runs where.

    Called whenever something changed. Whatever it needs to know of the past stands in the
    snapshot, so that the same snapshot gets the same plan, on devices and in the simulator.
    """

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """Plans the steps to launch at once; never changes `snapshot`.

        Args:
          now: The engine's clock [s], the one of arrivals and deadlines.
          snapshot: All that may be looked at.

        Returns:
          A plan that passes `loongjax.scheduler.validate`. Without steps it means: wait for
          a step in flight or a new request. If there are neither, the engine gives up the
          oldest request, so plan something whenever nothing is in flight.
        """
        ...
