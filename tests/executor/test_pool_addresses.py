"""Pools stay where they are while steps run, and are rebuilt when a step fails."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from loongjax.plan import Chunk, DecodeRow, DecodeStep, Placement, PrefillStep, Share, StepResult
from loongjax.programs.library import ProgramLibrary
from tests.esp.rig import Rig

INSTANCES = 4
PROMPT = list(range(1, 12))


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    rig = Rig(instances=INSTANCES, block_size=4, program_dir=tmp_path_factory.mktemp("programs"))
    yield rig
    rig.executor.close()


def generate(rig: Rig, name: str, group: tuple[int, ...], tokens: int) -> list[int]:
    """Greedy tokens of the same prompt, with KV all over the group."""
    rig.admit(name, PROMPT)
    parts = np.array_split(PROMPT, len(group))
    keep = {name: {i: len(part) for i, part in zip(group, parts, strict=True)}}
    found = [rig.prefill(group, {name: len(PROMPT)}, keep).tokens[0].token]
    for _ in range(tokens - 1):
        found.append(rig.decode(group, [DecodeRow(name, group[0], group[-1])]).tokens[0].token)
    rig.release(name)
    return found


def addresses(rig: Rig) -> list[tuple[int, int]]:
    """Where K and V of each instance lie."""
    pools = [rig.executor.memory.pool_of((instance,)) for instance in range(INSTANCES)]
    return [(pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()) for pool in pools]


def test_pools_stay_where_they_are_through_100_steps_and_20_changes_of_group(rig):
    before = addresses(rig)
    groups = [(2, 3), (0, 1, 2, 3), (1, 3), (3,)]
    steps = changes = 0
    previous = None
    for number, group in enumerate(itertools.islice(itertools.cycle(groups), 21)):
        changes += previous is not None and group != previous
        previous = group
        generate(rig, f"a{number}", group, 5)
        steps += 5
        assert addresses(rig) == before
    assert steps >= 100
    assert changes >= 20
    assert len({address for pair in before for address in pair}) == 2 * INSTANCES


# ---- failures ---------------------------------------------------------------------------


class Trouble(RuntimeError):
    """What the tests inject."""


def no_program(get, spec, group):
    raise Trouble("there is no such program")


def pool_donated_and_lost(get, spec, group):
    """The launch itself fails, after the program took the pool."""

    def run(*arguments):
        get(spec, group)(*arguments)
        raise Trouble("what it returned is lost")

    return run


def tokens_never_arrive(get, spec, group):
    """The launch goes well, and waiting for the tokens fails."""

    def run(*arguments):
        pool, said, *scores = get(spec, group)(*arguments)
        said.delete()
        return pool, said, *scores

    return run


FAILURES = {
    no_program: "Trouble: there is no such program",
    pool_donated_and_lost: "Trouble: what it returned is lost",
    tokens_never_arrive: "RuntimeError: Array has been deleted",
}


@contextmanager
def first_program_fails(failure):
    """`ProgramLibrary.get` misbehaves once, then does what it should."""
    get, times = ProgramLibrary.get, itertools.count()

    def failing_get(self, spec, group):
        plain = partial(get, self)
        return failure(plain, spec, group) if next(times) == 0 else plain(spec, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgramLibrary, "get", failing_get)
        yield


def submit(rig: Rig, step: PrefillStep | DecodeStep) -> StepResult:
    rig.executor.submit(step, rig.allocator.apply(step))
    results = []
    while not results:
        results = rig.executor.poll(60.0)
    (result,) = results
    return result


def prefill_step(rig: Rig, name: str, group: tuple[int, ...]) -> PrefillStep:
    length = len(PROMPT)
    return PrefillStep(
        seq=rig.next_seq(),
        group=group,
        chunks=(Chunk(request=name, start=0, length=length, last=True),),
        keep=(Placement(request=name, shares=(Share(group[0], length),)),),
    )


def decode_step(rig: Rig, name: str, group: tuple[int, ...]) -> DecodeStep:
    return DecodeStep(seq=rig.next_seq(), group=group, rows=(DecodeRow(name, group[0], group[-1]),))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_failed_step_says_so_and_later_steps_work(rig, failure, kind):
    group, wanted = (2, 3), generate(rig, "good", (2, 3), 4)
    before = addresses(rig)
    rig.admit("bad", PROMPT)
    step = prefill_step(rig, "bad", group)
    if kind == "decode":
        assert submit(rig, step).error is None
        step = decode_step(rig, "bad", group)
    with first_program_fails(failure):
        result = submit(rig, step)
    assert result.seq == step.seq
    assert result.error is not None
    assert result.error.startswith(FAILURES[failure])
    assert result.tokens == ()
    rig.allocator.release("bad")  # the executor knows by itself that the KV is lost

    for instance in range(INSTANCES):
        pool = rig.executor.memory.pool_of((instance,))
        assert not any(leaf.is_deleted() for leaf in pool)
        if instance in group:
            assert not any(np.asarray(leaf).any() for leaf in pool), "not a new pool"
    assert addresses(rig)[:2] == before[:2]
    assert generate(rig, "bad", group, 4) == wanted
    assert generate(rig, "all", (0, 1, 2, 3), 4) == wanted


def test_a_failure_leaves_the_kv_of_other_instances_alone(rig):
    wanted = generate(rig, "whole", (0,), 4)
    rig.admit("kept", PROMPT)
    rig.admit("bad", PROMPT)
    results = [submit(rig, prefill_step(rig, "kept", (0,)))]
    with first_program_fails(pool_donated_and_lost):
        assert submit(rig, prefill_step(rig, "bad", (2, 3))).error is not None
    results += [submit(rig, decode_step(rig, "kept", (0,))) for _ in range(3)]
    rig.release("bad")
    rig.release("kept")
    assert [result.tokens[0].token for result in results] == wanted


def test_the_prompt_is_one_whose_tokens_differ(rig):
    """Else equal tokens would show nothing."""
    assert len(set(generate(rig, "check", (3,), 5))) > 2
