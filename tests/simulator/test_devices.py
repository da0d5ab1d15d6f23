"""Steps on a virtual clock: in order on an instance, and slower together where cores are shared."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.costmodel import Crowding
from loongjax.simulator.devices import Devices

Launch: TypeAlias = tuple[float, tuple[int, ...], float, bool]
"""When, on which group, how long alone, and whether it is a prompt."""
Times: TypeAlias = dict[int, list[float]]
"""When each step began and ended."""

MIXED = Crowding(prefill_prefill=0.8, prefill_decode=0.5, decode_prefill=2.0, decode_decode=0.4)


def alike(part: float) -> Crowding:
    return Crowding(
        prefill_prefill=part, prefill_decode=part, decode_prefill=part, decode_decode=part
    )


def run(crowding: Crowding, *launches: Launch) -> Times:
    devices = Devices(crowding)
    for seq, (now, group, seconds, is_prompt) in enumerate(launches):
        devices.launch(now, seq, group, seconds, is_prompt=is_prompt)
    found = {}
    while (end := devices.next_end) is not None:
        for step in devices.advance(end):
            found[step.seq] = [step.started, step.ended]
    return found


def plainly(crowding: Crowding, *launches: Launch) -> Times:
    """The same, with every step's remaining work counted for itself, from event to event."""
    now, found = 0.0, {}
    left = {seq: seconds for seq, (_, _, seconds, _) in enumerate(launches)}

    def waits(seq: int) -> bool:
        at, group, _, _ = launches[seq]
        return at > now or any(
            other < seq and not set(launches[other][1]).isdisjoint(group) for other in left
        )

    def slowness(seq: int, running: list[int]) -> float:
        kinds = {True: "prefill", False: "decode"}
        beside = [
            getattr(crowding, f"{kinds[launches[seq][3]]}_{kinds[launches[other][3]]}")
            for other in running
            if other != seq
        ]
        return 1.0 + sum(beside)

    while left:
        running = [seq for seq in left if not waits(seq)]
        for seq in running:
            found.setdefault(seq, [now])
        slow = {seq: slowness(seq, running) for seq in running}
        ends = {seq: now + left[seq] * slow[seq] for seq in running}
        coming = [at for at, _, _, _ in launches if at > now]
        then = min([*ends.values(), *coming])
        for seq in running:
            left[seq] -= (then - now) / slow[seq]
            if ends[seq] == then:
                del left[seq]
                found[seq].append(then)
        now = then
    return found


def test_steps_on_one_instance_follow_each_other() -> None:
    launches = (0.0, (0,), 2.0, True), (1.0, (0, 1), 1.0, False), (1.0, (2,), 1.0, True)
    assert run(Crowding(), *launches) == {0: [0.0, 2.0], 1: [2.0, 3.0], 2: [1.0, 2.0]}


@pytest.mark.parametrize("is_prompt", [True, False])
def test_groups_that_share_all_cores_take_twice_as_long_together(is_prompt: bool) -> None:
    launches = (0.0, (0,), 1.0, is_prompt), (0.0, (1,), 1.0, is_prompt)
    assert run(alike(1.0), *launches) == {0: [0.0, 2.0], 1: [0.0, 2.0]}


def test_only_while_the_other_works() -> None:
    """Step 1 comes when 0 has half done: 0 needs two seconds more, and 1 the rest alone."""
    launches = (0.0, (0,), 2.0, True), (1.0, (1,), 2.0, True)
    assert run(alike(1.0), *launches) == {0: [0.0, 3.0], 1: [1.0, 4.0]}


def test_a_decode_suffers_more_from_a_prompt_than_a_prompt_from_a_decode() -> None:
    """The decode gets a third of a second's work in each; when it ends, the prompt has 2 of its
    3 seconds behind it.
    """
    launches = (0.0, (0,), 3.0, True), (0.0, (1,), 1.0, False)
    assert run(MIXED, *launches) == {0: [0.0, 4.0], 1: [0.0, 3.0]}


def test_a_step_is_slower_beside_each_of_the_others() -> None:
    """Two decodes and a prompt: the prompt takes 1 + 2 * 0.5, a decode 1 + 2 + 0.4, and then the
    decodes 1.4 alone.
    """
    launches = (0.0, (0,), 1.7, True), (0.0, (1,), 2.0, False), (0.0, (2,), 2.0, False)
    found = run(MIXED, *launches)
    assert found[0] == pytest.approx([0.0, 3.4])
    assert found[1] == found[2] == pytest.approx([0.0, 3.4 + 1.0 * 1.4])


steps = st.lists(
    st.tuples(
        st.floats(0.0, 1.0),
        st.sets(st.integers(0, 3), min_size=1).map(lambda group: tuple(sorted(group))),
        st.floats(0.01, 2.0),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)
part = st.floats(0.0, 3.0)
mixed = st.builds(
    Crowding, prefill_prefill=part, prefill_decode=part, decode_prefill=part, decode_decode=part
)


def launched(given_steps: list[Launch]) -> list[Launch]:
    now, launches = 0.0, []
    for wait, *rest in given_steps:
        now += wait
        launches.append((now, *rest))
    return launches


@given(steps, st.one_of(part.map(alike), mixed))
def test_work_is_shared_as_if_every_step_was_counted_for_itself(given_steps, crowding) -> None:
    launches = launched(given_steps)
    found, expected = run(crowding, *launches), plainly(crowding, *launches)
    assert found.keys() == expected.keys()
    for seq, times in expected.items():
        assert found[seq] == pytest.approx(times, abs=1e-9), seq


@given(steps, st.sampled_from([0.0, 1.0]))
def test_work_is_done_once_and_in_order(given_steps, crowding) -> None:
    launches = launched(given_steps)
    found = run(alike(crowding), *launches)
    assert found.keys() == set(range(len(launches)))
    for seq, (at, group, seconds, _) in enumerate(launches):
        began, ended = found[seq]
        before = [found[i][1] for i in range(seq) if not set(launches[i][1]).isdisjoint(group)]
        assert began == pytest.approx(max([at, *before]))
        assert ended - began >= seconds * (1 - 1e-9)
        if crowding == 0.0:
            assert ended - began == pytest.approx(seconds)
    if crowding == 1.0:  # nothing is lost, and nothing gained
        busy = sum(seconds for _, _, seconds, _ in launches)
        assert max(ended for _, ended in found.values()) <= launches[-1][0] + busy + 1e-6
