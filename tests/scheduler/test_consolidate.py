"""When KV that is spread moves together, and when it stays."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest

from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours
from loongjax.plan import (
    InstanceView,
    MigrateStep,
    Move,
    Plan,
    RequestView,
    Share,
    Snapshot,
    Topology,
    step_requests,
)
from loongjax.scheduler import validate
from loongjax.scheduler.policies.first_come import FirstCome
from tests.scheduler.virtual_engine import Job, VirtualEngine, decodes, migrations

SLOTS = 32


def decoding(name: str, *shares: tuple[int, int], **fields: object) -> RequestView:
    """It may generate 20 more tokens, if nothing else is said."""
    kv = tuple(Share(*share) for share in shares)
    computed = sum(share.tokens for share in kv)
    values = {"prompt": computed, "max_tokens": 21, "arrival": 0.0, "last_seq": 1} | fields
    return RequestView(id=name, computed=computed, generated=1, kv=kv, **values)


def waiting(prompt: int, **fields: object) -> RequestView:
    return RequestView(id="waits", prompt=prompt, max_tokens=2, arrival=9.0, **fields)


def snapshot(
    *running: RequestView,
    free: tuple[int, ...],
    waits: tuple[RequestView, ...] = (),
    topology: Topology | None = None,
    busy: dict[int, int] | None = None,
    block_size: int = 1,
) -> Snapshot:
    """Instances with so many free slots; what a prefill step makes busy stands in `busy`."""
    busy = busy or {}
    return Snapshot(
        version=0,
        next_seq=5,
        block_size=block_size,
        max_chunk_tokens=64,
        max_rows=4,
        waiting=waits,
        running=running,
        instances=tuple(
            InstanceView(
                id=i, slots=SLOTS, free_slots=n, busy_seq=busy.get(i), prefill_seq=busy.get(i)
            )
            for i, n in enumerate(free)
        ),
        in_flight=frozenset(),
        topology=topology or EverySubset(len(free)),
    )


def plan_of(found: Snapshot, headroom: int = 0) -> Plan:
    plan = FirstCome(tokens_per_rank=8, headroom=headroom).schedule(0.0, found)
    validate(found, plan)
    return plan


def moves_of(found: Snapshot, headroom: int = 0) -> list[Move]:
    return [m for step in migrations(plan_of(found, headroom).steps) for m in step.moves]


SPREAD = decoding("a", (0, 8), (1, 3))


def test_kv_comes_together_where_most_of_it_lies() -> None:
    plan = plan_of(snapshot(SPREAD, free=(24, 29)))
    assert plan.steps == (MigrateStep(seq=5, group=(0, 1), moves=(Move("a", 1, 0, 3),)),)


@pytest.mark.parametrize(("free", "moves"), [(23, 1), (22, 0)])
def test_there_is_room_to_its_end(free: int, moves: int) -> None:
    """Three tokens to move, 20 to come."""
    assert len(moves_of(snapshot(SPREAD, free=(free, 29)))) == moves


@pytest.mark.parametrize(("headroom", "moves"), [(4, 1), (5, 0)])
def test_what_others_there_are_granted_is_left_to_them(headroom: int, moves: int) -> None:
    other = decoding("b", (0, 2), arrival=1.0)
    found = [m for m in moves_of(snapshot(SPREAD, other, free=(27, 29)), headroom) if m]
    assert len(found) == moves


@pytest.mark.parametrize(("to_come", "moves"), [(4, 1), (3, 0)])
def test_fewer_tokens_move_than_may_be_generated(to_come: int, moves: int) -> None:
    view = decoding("a", (0, 8), (1, 3), max_tokens=to_come + 1)
    assert len(moves_of(snapshot(view, free=(24, 29)))) == moves


@pytest.mark.parametrize(
    ("prompt", "movers"), [(9, []), (10, ["a"]), (18, ["a"]), (19, ["a", "b"])]
)
def test_or_than_prompt_tokens_are_held_up_for_lack_of_instances(
    prompt: int, movers: list[str]
) -> None:
    """A prompt has put both off on 0 and 1, so that the next one waits; another runs on 2."""
    views = [decoding(name, (0, 10), (1, 9), max_tokens=3) for name in "ab"]
    found = snapshot(*views, free=(22, 23, 10), busy={2: 4}, waits=(waiting(prompt),))
    last_prompt = tuple(replace(view, prefill_seq=3) for view in found.instances[:2])
    found = replace(found, instances=(*last_prompt, found.instances[2]))
    assert [move.request for move in moves_of(found)] == movers


def test_prompts_that_wait_for_memory_do_not_count() -> None:
    view = decoding("a", (0, 12), (1, 9), max_tokens=3)
    assert moves_of(snapshot(view, free=(20, 3), waits=(waiting(28),))) == []


def test_group_gets_smaller_or_nothing_moves() -> None:
    assert moves_of(snapshot(SPREAD, free=(24, 29), topology=EverySubset(2, (2,)))) == []
    apart = decoding("a", (2, 8), (5, 3))
    ring = snapshot(apart, free=(32, 32, 24, 32, 32, 29), topology=Neighbours(6, (1, 4, 6)))
    assert moves_of(ring) == [Move("a", 5, 2, 3)]
    across = decoding("a", (1, 8), (2, 8), (3, 2))
    slices = snapshot(across, free=(32, 8, 8, 30), topology=AlignedSlices(4))
    assert moves_of(slices) == []  # no two of the three lie in a pair and have room


def test_as_few_homes_are_kept_as_have_room() -> None:
    view = decoding("a", (0, 12), (1, 6), (2, 3), (3, 2))
    assert moves_of(snapshot(view, free=(20, 26, 29, 30))) == [
        Move("a", 2, 1, 3),
        Move("a", 3, 1, 2),
    ]


def test_shares_move_in_one_piece_to_where_most_is_free() -> None:
    view = decoding("a", (0, 12), (1, 12), (2, 5), max_tokens=7)
    assert moves_of(snapshot(view, free=(4, 7, 27))) == [Move("a", 2, 1, 5)]
    assert moves_of(snapshot(view, free=(7, 4, 27))) == [Move("a", 2, 0, 5)]
    assert moves_of(snapshot(view, free=(4, 4, 27))) == []  # in pieces it would fit


def test_requests_on_the_same_instances_move_in_one_step() -> None:
    views = [
        decoding(name, (0, 4), (1, 1), max_tokens=6, arrival=float(i))
        for i, name in enumerate("abc")
    ]
    (step,) = plan_of(snapshot(*views, free=(15, 29))).steps
    assert isinstance(step, MigrateStep)
    assert step_requests(step) == ("a", "b", "c")
    # What a move takes is gone for the next one; what comes later is counted by headroom alone.
    (step,) = plan_of(snapshot(*views, free=(6, 29))).steps
    assert step_requests(step) == ("a",)


def test_busy_instances_and_those_of_prompts_are_left_alone() -> None:
    assert moves_of(snapshot(SPREAD, free=(24, 29), busy={1: 4})) == []
    plan = plan_of(snapshot(SPREAD, free=(24, 29), waits=(waiting(16),)))
    assert [step_requests(step) for step in plan.steps] == [("waits",)]


def test_blocks_are_counted_with_their_holes() -> None:
    view = decoding("a", (0, 8), (1, 3), max_tokens=6, holes=(Share(1, 5),))
    assert moves_of(snapshot(view, free=(16, 16), block_size=4)) == [Move("a", 1, 0, 3)]
    assert moves_of(snapshot(view, free=(12, 16), block_size=4)) == []


def test_request_that_grew_decodes_on_one_instance_when_there_is_room_again() -> None:
    policy = FirstCome(tokens_per_rank=16, headroom=0)
    it = VirtualEngine(policy, EverySubset(2), slots=16, block_size=1)
    degrees = []
    # `other` fills instance 1 together with `grows`, until it ends; `first` is on 0.
    for name, prompt, tokens in (("first", 4, 11), ("grows", 2, 8), ("other", 8, 5)):
        it.submit(Job(id=name, prompt=prompt, max_tokens=tokens, tokens=tokens))
        it.plan()
        it.end_one()
    while it.jobs:
        groups = [step.group for step in decodes(it.plan()) if "grows" in step_requests(step)]
        degrees += map(len, groups)
        it.end_one()
    assert it.preempted == []
    assert it.moved == [1]
    assert [degree for degree, _ in groupby(degrees)] == [1, 2, 1]
