"""Timing plans: what is counted, and what is refused."""

from __future__ import annotations

import pytest

from loongjax.errors import RequestError
from loongjax.simulator.deciding import time_deciding


def test_every_plan_that_is_timed_saw_the_requests() -> None:
    times = time_deciding("first_come", waiting=20, running=8, instances=2, plans=6)
    assert len(times.seconds) == 6
    assert all(seconds > 0.0 for seconds in times.seconds)
    assert times.waiting >= 16
    assert times.running >= 7
    assert times.percentile_ms(50) <= times.percentile_ms(99)


def test_more_than_ever_run_is_refused() -> None:
    with pytest.raises(RequestError, match="ask for fewer of them"):
        time_deciding("first_come", waiting=2, running=1, instances=1, plans=10_000)


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(RequestError, match="must be at least 1; they are 5, 5, 0 and 5"):
        time_deciding("first_come", waiting=5, running=5, instances=0, plans=5)
