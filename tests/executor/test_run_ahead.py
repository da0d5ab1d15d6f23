"""Decode steps launched before the last one's tokens are on the host say the same."""

from __future__ import annotations

import weakref
from itertools import pairwise

import numpy as np
import pytest

from loongjax.plan import DecodeRow, DecodeStep, SampledToken, StepResult
from tests.esp.rig import TINY, Rig
from tests.executor.test_pool_addresses import FAILURES, first_program_fails

STEPS = 6
PROMPTS = {"a": 20, "b": 9}


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    rig = Rig(instances=2, block_size=4, program_dir=tmp_path_factory.mktemp("programs"))
    yield rig
    rig.executor.close()


def start(rig: Rig) -> list[tuple[SampledToken, ...]]:
    rng = np.random.default_rng(0)
    for name, length in PROMPTS.items():
        rig.admit(name, rng.integers(0, TINY.vocab_size, length).tolist())
    keep = {name: {0: length // 2, 1: length - length // 2} for name, length in PROMPTS.items()}
    return [rig.prefill((0, 1), PROMPTS, keep).tokens]


def wait_for(rig: Rig, steps: int) -> list[StepResult]:
    results: list[StepResult] = []
    while len(results) < steps:
        results += rig.executor.poll(60.0)
    return results


def step(rig: Rig) -> DecodeStep:
    rows = (DecodeRow("a", 0, 1), DecodeRow("b", 1, 1))
    return DecodeStep(seq=rig.next_seq(), group=(0, 1), rows=rows)


def test_running_ahead_changes_nothing(rig):
    waited = start(rig)
    for _ in range(STEPS):
        waited.append(rig.run(step(rig)).tokens)
    for name in PROMPTS:
        rig.release(name)
    ahead = start(rig)
    for _ in range(STEPS):
        planned = step(rig)
        rig.executor.submit(planned, rig.allocator.apply(planned))
    results = wait_for(rig, STEPS)
    assert [result.seq for result in results] == sorted(result.seq for result in results)
    ahead += [result.tokens for result in results]
    assert ahead == waited
    for name in PROMPTS:
        rig.release(name)


@pytest.mark.parametrize("failure", FAILURES)
def test_what_is_queued_behind_a_failed_step_fails_too(rig, failure):
    """However the first one fails; results come in order, and later steps work."""
    start(rig)
    steps = [step(rig) for _ in range(3)]
    with first_program_fails(failure):
        for planned in steps:
            rig.executor.submit(planned, rig.allocator.apply(planned))
    results = wait_for(rig, 3)
    assert [result.seq for result in results] == [planned.seq for planned in steps]
    assert results[0].error.startswith(FAILURES[failure])
    assert all(result.error and not result.tokens for result in results)
    for name in PROMPTS:
        rig.release(name)
    again = [*start(rig), rig.run(step(rig)).tokens]
    for name in PROMPTS:
        rig.release(name)
    assert all(len(tokens) == 2 for tokens in again)


def test_records_of_queued_steps_do_not_overlap(rig):
    start(rig)
    for _ in range(STEPS):
        planned = step(rig)
        rig.executor.submit(planned, rig.allocator.apply(planned))
    results = wait_for(rig, STEPS)
    assert all(one.ended <= other.started for one, other in pairwise(results))
    for name in PROMPTS:
        rig.release(name)


def test_a_token_that_is_nowhere_fails_the_step(rig):
    start(rig)
    planned = step(rig)
    rig.executor.submit(planned, rig.allocator.apply(planned))
    alone = DecodeStep(seq=rig.next_seq(), group=(0,), rows=(DecodeRow("a", 0, 0),))
    rig.executor.submit(alone, rig.allocator.apply(alone))
    results = wait_for(rig, 2)
    errors = {result.seq: result.error for result in results}
    assert errors[planned.seq] is None
    assert "request 'a' is neither known" in errors[alone.seq]
    for name in PROMPTS:
        rig.release(name)


def test_nothing_keeps_the_tokens_of_a_request_that_is_forgotten(rig):
    """Though its group decodes no other rows after it."""
    start(rig)
    rig.run(step(rig))
    logs = {name: weakref.ref(rig.executor._logs[name]) for name in PROMPTS}
    rig.release("a")
    assert (logs["a"](), logs["b"]() is None) == (None, False)
    rig.release("b")
    assert logs["b"]() is None


def test_a_failed_step_leaves_no_frame_behind(rig):
    start(rig)
    rig.run(step(rig))
    planned = step(rig)
    with first_program_fails(next(iter(FAILURES))):
        rig.executor.submit(planned, rig.allocator.apply(planned))
    (result,) = wait_for(rig, 1)
    assert result.error
    assert planned.group not in rig.executor._frames
    for name in PROMPTS:
        rig.release(name)
