"""Instances that run empty, and policies that change, while requests run."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.errors import ConfigError, EngineClosedError
from loongjax.plan import Plan, Snapshot, StepResult
from loongjax.scheduler.learning import Learning
from loongjax.scheduler.policies.first_come import FirstCome
from tests.engine.fake_executor import answer
from tests.engine.rig import Rig, Wrapped, collect, rig

PROMPT = tuple(range(40))


def touched(parts: Rig, since: int) -> set[int]:
    """Instances that got KV in steps that ended after `since`."""
    records, _ = parts.engine.steps_since(since)
    return {share.instance for record in records for share in record.kept}


def test_a_drained_instance_gets_nothing_new_until_it_is_resumed() -> None:
    with rig(instances=3) as parts:
        parts.engine.drain(1)
        handles = [parts.submit(f"a{i}", PROMPT, max_tokens=20) for i in range(12)]
        for handle in handles:
            assert collect(handle)[0] == answer(PROMPT, 20)
        assert touched(parts, 0) == {0, 2}
        _, seen = parts.engine.steps_since(0)
        assert [each.draining for each in parts.engine.stats().instances] == [False, True, False]
        parts.engine.resume(1)
        handles = [parts.submit(f"b{i}", PROMPT, max_tokens=20) for i in range(12)]
        for handle in handles:
            assert collect(handle)[0] == answer(PROMPT, 20)
        assert 1 in touched(parts, seen)


@pytest.mark.parametrize("drained", [0, 1])
def test_requests_that_run_there_go_on(drained: int) -> None:
    """Whatever their steps do by themselves, they take no further block there."""
    with rig(instances=2, slots=128) as parts:
        parts.executor.hold()
        handles = [parts.submit(f"a{i}", PROMPT[: 9 + i], max_tokens=30) for i in range(4)]
        parts.engine.drain(drained)
        parts.executor.release()
        for i, handle in enumerate(handles):
            tokens, end = collect(handle)
            assert (tokens, end.reason) == (answer(PROMPT[: 9 + i], 30), "length")
        assert parts.engine.stats().instances[drained].used == 0


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    instances=st.integers(2, 4),
    block_size=st.sampled_from([1, 4]),
    slots=st.sampled_from([32, 128]),
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=10),
)
def test_drains_at_any_time_change_no_answer(
    seed: int, instances: int, block_size: int, slots: int, sizes: list[tuple[int, int]]
) -> None:
    chance = random.Random(seed)
    with rig(instances=instances, slots=slots, block_size=block_size) as parts:
        handles = []
        for number, (prompt, wanted) in enumerate(sizes):
            handles.append(parts.submit(str(number), PROMPT[:prompt], max_tokens=wanted))
            for instance in range(instances):
                match chance.randrange(4):
                    case 0 if len(parts.engine._drained | {instance}) < instances:
                        parts.engine.drain(instance)
                    case 1:
                        parts.engine.resume(instance)
        for (prompt, wanted), handle in zip(sizes, handles, strict=True):
            tokens, end = collect(handle)
            assert (tokens, end.reason) == (answer(PROMPT[:prompt], wanted), "length")


def test_use_is_told_right_while_it_drains() -> None:
    with rig(instances=2) as parts:
        parts.engine.drain(0)
        collect(parts.submit("a", PROMPT))
        assert [each.used for each in parts.engine.stats().instances] == [0, 0]


def test_the_last_instance_cannot_be_drained() -> None:
    with rig(instances=2) as parts:
        parts.engine.drain(0)
        parts.engine.drain(0)
        with pytest.raises(ConfigError, match="instance 1 is the last of 2"):
            parts.engine.drain(1)
        parts.engine.resume(0)
        parts.engine.drain(1)
        for wrong in (-1, 2):
            with pytest.raises(ConfigError, match=f"no instance {wrong}; they are 0 to 1"):
                parts.engine.drain(wrong)
            with pytest.raises(ConfigError, match="no instance"):
                parts.engine.resume(wrong)


def test_another_policy_plans_from_then_on() -> None:
    second = Wrapped(first=lambda snapshot: None)
    with rig(policy=FirstCome()) as parts:
        collect(parts.submit("a"))
        parts.engine.set_policy(second)
        assert collect(parts.submit("b"))[0] == answer((1, 2, 3), 4)
        assert second.seen
        engine = parts.engine
    for steer in (lambda: engine.set_policy(second), lambda: engine.drain(0)):
        with pytest.raises(EngineClosedError):
            steer()


class Listening(Learning):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.inner = FirstCome()  # which asks for no cost
        self.heard: list[int] = []

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        return self.inner.schedule(now, snapshot)

    def observe(self, result: StepResult) -> None:
        self.heard.append(result.seq)


def test_a_policy_that_learns_hears_of_steps_from_then_on() -> None:
    second = Listening()
    with rig(policy=FirstCome()) as parts:
        collect(parts.submit("a"))
        parts.engine.set_policy(second)
        collect(parts.submit("b"))
        assert second.heard == [record.seq for record in parts.engine.steps_of("b")]


def test_steps_since_gives_each_step_once() -> None:
    with rig() as parts:
        seen, found = 0, []
        for name in "abc":
            collect(parts.submit(name))
            records, seen = parts.engine.steps_since(seen)
            found += records
        records, _ = parts.engine.steps_since(seen)
        assert tuple(found) + records == parts.engine.steps()
        assert parts.engine.steps_since(10**9)[0] == ()


def test_a_request_that_fits_no_longer_ends_with_an_error() -> None:
    with rig(instances=2, slots=64) as parts:
        parts.engine.drain(0)
        _, end = collect(parts.submit("a", tuple(range(100))))
        assert end.reason == "error"
        assert "draining" in end.error
