"""Which groups `FirstCome` lets go on by themselves."""

from __future__ import annotations

from loongjax.plan import Group
from tests.scheduler.first_come_rig import begin, engine, submit
from tests.scheduler.virtual_engine import VirtualEngine


def going_on(it: VirtualEngine) -> frozenset[Group]:
    it.plan()
    return it.plans[-1][1].ahead


def test_a_group_that_nobody_waits_for_goes_on() -> None:
    it = engine(2)
    submit(it, "a", 4)
    begin(it, "a")
    (group,) = going_on(it)
    assert it.continued == 1
    assert going_on(it) == {group}  # also while it is in flight
    it.end_one()
    it.run_ahead()
    assert it.continued == 2


def test_a_prompt_that_lacks_instances_lets_their_groups_drain() -> None:
    it = engine(4)
    for name in "ab":
        submit(it, name, 16)
    begin(it, *"ab")
    it.plan()
    before = it.plans[-1][1].ahead
    assert len(before) == 2
    submit(it, "long", 48)  # three instances: the two that are idle, and one that is not
    (after,) = going_on(it)
    assert after in before
    while it.flying and not it.jobs["long"].generated:
        it.end_one()
        it.plan()
    assert it.jobs["long"].generated


def test_a_prompt_that_waits_for_memory_drains_nobody() -> None:
    it = engine(1, slots=32, headroom=0)
    submit(it, "a", 16, tokens=10)
    begin(it, "a")
    submit(it, "b", 20, tokens=2)
    assert going_on(it) == {(0,)}


def test_a_group_that_got_too_large_drains() -> None:
    it = engine(2, slots=24, tokens_per_rank=8, headroom=0)
    submit(it, "long", 30, tokens=3)
    begin(it, "long")
    assert len(it.homes("long")) == 2
    submit(it, "a", 2, tokens=8)
    begin(it, "a")
    while "long" in it.jobs:
        it.plan()
        it.end_one()
    it.plan()
    assert all(len(group) == 1 for group in it.plans[-1][1].ahead)
    it.run()
