"""Steps on a virtual clock: in order on an instance, and slower together where cores are shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.simulator.devices import Devices


def run(crowding: float, *launches: tuple[float, tuple[int, ...], float]) -> dict[int, list[float]]:
    """`(time, group, seconds)` of steps 0, 1, …; gives when each began and ended."""
    devices = Devices()
    for seq, (now, group, seconds) in enumerate(launches):
        devices.launch(now, seq, group, seconds, crowding)
    found = {}
    while (end := devices.next_end) is not None:
        for step in devices.advance(end):
            found[step.seq] = [step.started, step.ended]
    return found


def test_steps_on_one_instance_follow_each_other() -> None:
    assert run(0.0, (0.0, (0,), 2.0), (1.0, (0, 1), 1.0), (1.0, (2,), 1.0)) == {
        0: [0.0, 2.0],
        1: [2.0, 3.0],
        2: [1.0, 2.0],
    }


def test_groups_that_share_all_cores_take_twice_as_long_together() -> None:
    assert run(1.0, (0.0, (0,), 1.0), (0.0, (1,), 1.0)) == {0: [0.0, 2.0], 1: [0.0, 2.0]}


def test_only_while_the_other_works() -> None:
    """Step 1 comes when 0 has half done: 0 needs two seconds more, and 1 the rest alone."""
    assert run(1.0, (0.0, (0,), 2.0), (1.0, (1,), 2.0)) == {0: [0.0, 3.0], 1: [1.0, 4.0]}


def test_different_steps_slow_each_other_by_the_mean() -> None:
    devices = Devices()
    devices.launch(0.0, 0, (0,), 1.0, 0.8)
    devices.launch(0.0, 1, (1,), 2.0, 0.4)
    assert devices.next_end == pytest.approx(1.6)
    assert [step.seq for step in devices.advance(1.6)] == [0]
    assert devices.next_end == pytest.approx(2.6)


steps = st.lists(
    st.tuples(
        st.floats(0.0, 1.0),
        st.sets(st.integers(0, 3), min_size=1).map(lambda group: tuple(sorted(group))),
        st.floats(0.01, 2.0),
    ),
    min_size=1,
    max_size=12,
)


@given(steps, st.sampled_from([0.0, 0.3, 1.0]))
def test_work_is_done_once_and_in_order(given_steps, crowding) -> None:
    now, launches = 0.0, []
    for wait, group, seconds in given_steps:
        now += wait
        launches.append((now, group, seconds))
    found = run(crowding, *launches)
    assert found.keys() == set(range(len(launches)))
    for seq, (launched, group, seconds) in enumerate(launches):
        began, ended = found[seq]
        assert began >= launched
        assert ended - began >= seconds * (1 - 1e-9)
        before = [found[i][1] for i in range(seq) if not set(launches[i][1]).isdisjoint(group)]
        assert began == pytest.approx(max([launched, *before]))
    if crowding == 1.0:  # nothing is lost, and nothing gained
        busy = sum(seconds for _, _, seconds in launches)
        assert max(ended for _, ended in found.values()) <= launches[-1][0] + busy + 1e-6
