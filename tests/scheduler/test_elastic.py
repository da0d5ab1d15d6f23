"""The plans of `Elastic`, one decision at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.cluster.topology import EverySubset
from loongjax.costmodel.protocol import ChunkWork
from loongjax.errors import ConfigError
from loongjax.plan import (
    Chunk,
    DecodeStep,
    Flight,
    InstanceView,
    MigrateStep,
    Move,
    Plan,
    PrefillStep,
    RequestView,
    Share,
    Snapshot,
    Step,
    step_requests,
)
from loongjax.scheduler import validate
from loongjax.scheduler.policies import create_policy
from loongjax.scheduler.policies.elastic import Elastic
from loongjax.scheduler.policies.elastic.fused import spread
from loongjax.scheduler.policies.elastic.order import AloneTimes, Order
from loongjax.scheduler.policies.elastic.reasons import DUE
from tests.scheduler.analytic_cost import AnalyticCost

SLOTS = 200_000
NOW = 100.0


def waiting(name: str, prompt: int, **fields: object) -> RequestView:
    return RequestView(id=name, prompt=prompt, **{"max_tokens": 100, "arrival": NOW} | fields)


def begun(name: str, prompt: int, *kv: tuple[int, int], **fields: object) -> RequestView:
    shares = tuple(Share(*share) for share in kv)
    return waiting(
        name, prompt, computed=sum(share.tokens for share in shares), kv=shares, **fields
    )


def decoding(
    name: str, *kv: tuple[int, int], generated: int = 50, due_in: float = 0.045, **fields: object
) -> RequestView:
    """One whose next token is due so soon, at the default pace."""
    tokens = max(1, generated)
    pace = 0.045 * (tokens - 0.4 * min(tokens, 8))
    computed = sum(tokens for _, tokens in kv)
    return RequestView(
        id=name,
        prompt=computed - generated + 1,
        computed=computed,
        generated=generated,
        kv=tuple(Share(*share) for share in kv),
        first_token=NOW + due_in - pace,
        **{"max_tokens": 500, "arrival": 1.0, "last_seq": 7} | fields,
    )


def plan(
    *views: RequestView,
    instances: int = 4,
    flying: dict[float, Step] | None = None,
    **settings: object,
) -> Plan:
    """Of a snapshot in which these are all; `flying`: steps in flight by when they began."""
    flights = tuple(Flight(step, launched) for launched, step in (flying or {}).items())
    busy = {i: flight.step.seq for flight in flights for i in flight.step.group}
    held = [sum(dict(view.kv).get(i, 0) for view in views) for i in range(instances)]
    in_flight = frozenset(name for flight in flights for name in step_requests(flight.step))
    snapshot = Snapshot(
        version=0,
        next_seq=10,
        block_size=1,
        max_chunk_tokens=SLOTS,
        max_rows=256,
        waiting=tuple(view for view in views if view.uncomputed > 1),
        running=tuple(view for view in views if view.uncomputed == 1),
        instances=tuple(
            InstanceView(
                id=i,
                slots=SLOTS,
                free_slots=SLOTS - held[i],
                busy_seq=busy.get(i),
                prefill_seq=busy.get(i),
            )
            for i in range(instances)
        ),
        in_flight=in_flight,
        topology=EverySubset(instances),
        flights=flights,
    )
    policy = Elastic(**{"cost": AnalyticCost()} | settings)
    found = policy.schedule(NOW, snapshot)
    validate(snapshot, found)
    assert policy.schedule(NOW, snapshot) == found
    return found


def prefills(found: Plan) -> list[PrefillStep]:
    return [step for step in found.steps if isinstance(step, PrefillStep)]


def seconds(step: PrefillStep, cost: AnalyticCost | None = None) -> float:
    works = [ChunkWork(chunk.length, chunk.start) for chunk in step.chunks]
    return (cost or AnalyticCost()).prefill(len(step.group), works)


# ---- steps that last as long as they may ---------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_of_equal_time() -> None:
    first = prefills(plan(waiting("a", 150_000)))[0]
    (chunk,) = first.chunks
    assert 0.9 * 0.5 < seconds(first) <= 0.5
    homes = [(i, chunk.length // len(first.group)) for i in first.group]
    later = prefills(plan(begun("a", 150_000, *homes)))[0]
    assert later.chunks[0].start == sum(tokens for _, tokens in homes)
    assert later.group == first.group
    assert 0.9 * 0.5 < seconds(later) <= 0.5


def test_decodes_ride_along_and_bound_the_step() -> None:
    rows = [decoding(f"d{i}", (i, 1000)) for i in range(4)]
    found = plan(*rows, waiting("a", 4000), decode_s=0.045)
    (step,) = prefills(found)
    assert {chunk.request for chunk in step.chunks} >= {"a"}
    assert step.chunks[0].length == 1
    assert seconds(step) <= 0.045
    others = [step for step in found.steps if isinstance(step, DecodeStep)]
    assert len(others) == 3, "the other instances decode"


def test_who_is_ahead_of_its_pace_can_wait_for_a_longer_chunk() -> None:
    lengths = []
    for due in (0.045, 0.2):
        rows = [decoding(f"d{i}", (i, 1000), due_in=due) for i in range(4)]
        (step,) = prefills(plan(*rows, waiting("a", 5000)))
        lengths.append(step.chunks[-1].length)
    assert 0 < lengths[0] < lengths[1]


def test_who_is_late_catches_up_while_prompts_get_on() -> None:
    """Steps take half of the time that there is for a token."""
    cost = AnalyticCost(constant=2e-3, hop=0.0, weights=5e-3)
    rows = [decoding(f"d{i}", (i, 100), due_in=-0.01) for i in range(4)]
    (step,) = prefills(plan(*rows, waiting("a", 4000), cost=cost))
    assert step.chunks[-1].request == "a"
    assert 0.8 * 0.0225 < seconds(step, cost) <= 0.0225


def test_a_prompt_that_starves_gets_on_in_any_case() -> None:
    rows = [decoding(f"d{i}", (i, 1000), due_in=-0.01) for i in range(4)]
    (step,) = prefills(plan(*rows, waiting("a", 4000, arrival=0.0)))
    assert step.chunks[-1].request == "a"
    assert step.chunks[-1].length < 4000, "by as little as is worth it"


def test_decodes_do_not_ride_along_where_that_takes_longer() -> None:
    """Where history is dear in prefill steps, they have a step of their own afterwards."""
    rows = [decoding(f"d{i}", (i, 1000), due_in=0.3) for i in range(4)]
    found = plan(*rows, waiting("a", 1000), cost=AnalyticCost(square=1e-4))
    assert {len(step.chunks) for step in prefills(found)} <= {1}


# ---- order ---------------------------------------------------------------------------


def test_a_short_prompt_overtakes_a_long_one_between_its_chunks() -> None:
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000), (2, 20_000))
    found = plan(lane, waiting("short", 500), decoding("d", (3, 1000)))
    by_group = {step.group: step_requests(step) for step in prefills(found)}
    assert by_group[(3,)] == ("d", "short")
    assert by_group[(0, 1, 2)] == ("long",)


def test_the_order_is_of_waiting_by_how_long_it_takes() -> None:
    order = Order(AloneTimes(AnalyticCost(), 4, floor_s=0.04), now=NOW)
    long = waiting("long", 150_000, arrival=NOW - 20.0)
    short = waiting("short", 500, arrival=NOW - 0.3)
    assert order.first([long, short], 1) == [short]
    for_long = replace(long, arrival=NOW - 400.0)
    assert order.first([for_long, short], 1) == [for_long]
    shares = (Share(0, 149_000),)
    nearly_done = replace(long, id="nearly", computed=149_000, kv=shares, arrival=NOW - 4.0)
    assert order.first([long, nearly_done], 1) == [nearly_done]
    assert order.first([short, nearly_done], 1) == [short]


@given(st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_first_of_many_are_those_of_all(random: Random) -> None:
    order = Order(AloneTimes(AnalyticCost(), 4, floor_s=0.04), now=NOW)
    views = [
        replace(
            waiting(str(i), random.choice((1, 500, 800, 20_000, 150_000))),
            arrival=NOW - random.choice((0.0, 0.5, 3.0, 40.0)),
            priority=random.choice((0, 0, 0, 0, 1, -1)),
            deadline=random.choice((None, None, None, NOW + 1.0, NOW + 50.0)),
            computed=random.choice((0, 0, 0, 1)) * 400,
        )
        for i in range(60)
    ]
    assert order.first(views, 10) == order.first(views, 60)[:10]


def test_who_has_to_begin_to_meet_its_deadline_goes_first() -> None:
    alone = AloneTimes(AnalyticCost(), 4, floor_s=0.04)
    order = Order(alone, now=NOW)
    short, rest = waiting("short", 500, arrival=NOW - 0.3), alone.whole_s(150_000)
    for seconds_left, goes_first in ((0.9, False), (1.2, True), (3.0, False)):
        view = waiting("long", 150_000, deadline=NOW + seconds_left * rest)
        assert (order.first([short, view], 1) == [view]) is goes_first
    preferred = waiting("preferred", 150_000, priority=1)
    urgent = waiting("urgent", 150_000, deadline=NOW + 1.2 * rest)
    assert order.first([urgent, preferred], 1) == [preferred]


def test_a_deadline_that_cannot_be_met_is_refused_only_if_that_is_asked_for() -> None:
    late = waiting("late", 150_000, deadline=NOW + 1.0)
    assert prefills(plan(late))
    found = plan(late, waiting("other", 500), reject_late=True)
    (rejection,) = found.reject
    assert rejection.request == "late"
    assert "150000 tokens" in rejection.reason


# ---- why -----------------------------------------------------------------------------


def test_every_prompt_that_is_looked_at_is_told_why() -> None:
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000), (2, 20_000))
    found = plan(lane, waiting("short", 500), waiting("big", 4 * SLOTS - 70_000))
    told = dict(found.reasons)
    assert told.keys() == {"long", "short", "big"}
    assert told["long"].startswith("goes on")
    assert told["short"].startswith("begins on one instance")
    assert told["big"].startswith("waits: it and those who hold KV may need more memory")


def test_a_lane_says_how_wide_it_is_and_why() -> None:
    told = dict(plan(waiting("a", 150_000), decoding("d", (3, 1000))).reasons)
    assert told["a"] == "begins on a lane, 3 wide: it can use 4, needs 2; 1 left to decodes"


@pytest.mark.parametrize("tokens", [1, 2, 3, 1000, 1024, 99_999])
def test_times_alone_are_interpolated(tokens: int) -> None:
    alone = AloneTimes(AnalyticCost(), 2, floor_s=0.04)
    exact = AnalyticCost().prefill(2, [ChunkWork(tokens, 0)])
    assert alone.whole_s(tokens) == pytest.approx(exact, rel=0.2)


# ---- lanes ---------------------------------------------------------------------------


def homes_of(step: PrefillStep) -> set[int]:
    """Where a step keeps KV."""
    return {share.instance for placement in step.keep for share in placement.shares}


def test_a_lane_leaves_an_instance_to_decodes() -> None:
    (step,) = prefills(plan(waiting("a", 150_000), decoding("d", (3, 1000))))
    assert step.group == (0, 1, 2)
    assert homes_of(step) == {0, 1, 2}, "its KV lies evenly on the lane"


def test_while_nobody_else_is_there_a_long_prompt_computes_on_all_instances() -> None:
    (step,) = prefills(plan(waiting("a", 150_000)))
    assert step.group == (0, 1, 2, 3)
    assert homes_of(step) == {0, 1, 2}, "whoever comes can decode beside its KV"
    for homes in ({0, 1, 2}, {1}):
        (step,) = prefills(plan(begun("a", 150_000, *((home, 9_000) for home in homes))))
        assert step.group == (0, 1, 2, 3)
        assert homes_of(step) == homes


def test_two_long_prompts_share_a_lane() -> None:
    first = begun("a", 150_000, (0, 9_000), (1, 9_000), (2, 9_000), arrival=NOW - 10)
    found = plan(first, waiting("b", 40_000), decoding("d", (3, 1000)))
    groups = {step.group for step in prefills(found)}
    assert (0, 1, 2) in groups
    assert groups <= {(0, 1, 2), (3,)}


def test_long_prompts_that_come_together_are_computed_beside_each_other() -> None:
    """On one instance each, though every one of them could use more."""
    alone = plan(waiting("a", 40_000), decoding("d", (3, 1000)))
    assert {step.group for step in prefills(alone)} == {(0, 1, 2)}
    together = plan(*(waiting(name, 40_000) for name in "abc"), decoding("d", (3, 1000)))
    assert {step.group for step in prefills(together)} >= {(0,), (1,), (2,)}


def test_while_nobody_decodes_lanes_take_all_instances() -> None:
    """Each of these prompts needs two of the four."""
    views = [waiting(name, 150_000) for name in "ab"]
    assert {step.group for step in prefills(plan(*views))} == {(0, 1), (2, 3)}
    beside = prefills(plan(*views, decoding("d", (3, 1000))))
    assert not any(3 in homes_of(step) for step in beside)


def test_what_needs_all_instances_gets_them() -> None:
    (step,) = prefills(plan(waiting("a", 3 * SLOTS + 1000)))
    assert step.group == (0, 1, 2, 3)


def test_what_lies_on_all_instances_gets_on_there_when_its_turn_comes() -> None:
    wide = begun("wide", 500_000, *((i, 40_000) for i in range(4)), arrival=NOW - 60)
    (step,) = prefills(plan(wide, waiting("new", 150_000)))
    assert step.group == (0, 1, 2, 3)


def test_a_lane_stays_narrow_though_a_prompt_lies_on_all_instances() -> None:
    wide = begun("wide", 400_000, *((i, 40_000) for i in range(4)), arrival=NOW - 1)
    found = plan(wide, waiting("old", 150_000, arrival=NOW - 90), decoding("d", (3, 1000)))
    groups = {step.group: [chunk.request for chunk in step.chunks] for step in prefills(found)}
    assert groups == {(0, 1, 2): ["old"]}
    assert [step.group for step in found.steps if isinstance(step, DecodeStep)] == [(3,)]


def test_a_lane_is_as_wide_as_memory_asks() -> None:
    full = [decoding(f"d{i}", (i, 140_000), due_in=2.0) for i in range(3)]
    (step,) = prefills(plan(waiting("a", 330_000), *full))
    assert step.group == (0, 1, 2, 3)


def test_who_is_nearly_done_does_not_starve_others() -> None:
    """How long it has waited is held against all of its work, not what is left of it."""
    nearly = begun("nearly", 500_000, *((i, 124_000) for i in range(4)), arrival=NOW - 60)
    rider = decoding("d", (3, 1000), due_in=0.002)
    assert not prefills(plan(nearly, rider))
    starving = replace(nearly, arrival=NOW - 5_000)
    assert prefills(plan(starving, rider))


def test_a_lane_waits_until_all_of_it_is_idle() -> None:
    """What is idle of it does nothing that lasts longer."""
    chunk = Chunk(request="s", start=0, length=1000, last=True)
    flying = PrefillStep(seq=9, group=(2,), chunks=(chunk,), keep=())
    views = [
        begun("long", 180_000, (0, 20_000), (1, 20_000), (2, 20_000)),
        replace(decoding("s", (2, 1000), generated=0), last_seq=9),
    ]
    found = plan(*views, flying={NOW - 0.05: flying})
    assert not found.steps


def crowd(count: int, tokens: int) -> list[RequestView]:
    """So many who decode on the last instance that two are left to decodes."""
    return [decoding(f"e{i}", (3, tokens)) for i in range(count)]


def test_who_decodes_across_a_lane_and_others_goes_first() -> None:
    """It cannot ride along in steps of the lane, and those would follow each other for ever."""
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000))
    across = decoding("d", (0, 30_000), (1, 30_000), (2, 30_000), due_in=0.01)
    found = plan(lane, across, *crowd(60, 2000))
    assert not prefills(found)
    assert (0, 1, 2) in [step.group for step in found.steps if isinstance(step, DecodeStep)]
    ahead = replace(across, first_token=across.first_token + 0.04)
    (step,) = prefills(plan(lane, ahead, *crowd(60, 2000)))
    assert step.group == (0, 1)


def test_who_decodes_across_a_move_is_waited_for() -> None:
    """What is idle of its instances does nothing that lasts longer than the move."""
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000))
    across = decoding("d", (0, 30_000), (1, 30_000), (2, 30_000))
    moves = decoding("m", (1, 5000))
    found = plan(lane, across, moves, waiting("s", 3000), *crowd(50, 700))
    assert any(isinstance(step, MigrateStep) and step.group == (1, 3) for step in found.steps)
    assert not any({0, 2} & set(step.group) for step in found.steps)


# ---- decodes move out of the way -----------------------------------------------------


def test_decodes_move_away_from_a_lane() -> None:
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000), (2, 20_000))
    found = plan(lane, decoding("d", (1, 3000)), decoding("e", (3, 1000)))
    (move,) = [step for step in found.steps if isinstance(step, MigrateStep)]
    assert move.moves == (Move("d", 1, 3, 3000),)
    assert move.group == (1, 3)


@pytest.mark.parametrize("generated", [1, 2])
def test_decodes_stay_until_a_move_does_not_make_them_late(generated: int) -> None:
    """All that moves counts: one instance receives it. What they are early by may be used up."""
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000), (2, 20_000))
    kv = [(i, 7000) for i in range(3)]
    just_began = decoding("d", *kv, generated=generated, due_in=0.001)
    found = plan(lane, just_began, decoding("e", (3, 1000)))
    moves = [step for step in found.steps if isinstance(step, MigrateStep)]
    assert len(moves) == (generated == 2)


def test_decodes_move_though_a_prompt_lies_on_all_instances() -> None:
    """Lanes are not as wide, and it grows evenly: it takes a part of what is free on each."""
    lane = begun("long", 500_000, *((i, 20_000) for i in range(4)))
    found = plan(lane, decoding("d", (1, 3000)), decoding("e", (3, 1000)))
    (move,) = [step for step in found.steps if isinstance(step, MigrateStep)]
    assert move.moves == (Move("e", 3, 1, 1000),)


def test_who_is_late_moves_all_the_same() -> None:
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000), (2, 20_000))
    late = decoding("d", (1, 20_000), due_in=-0.5)
    found = plan(lane, late, decoding("e", (3, 1000)))
    assert any(isinstance(step, MigrateStep) for step in found.steps)


def test_a_short_prompt_stays_on_its_instance() -> None:
    """Though that is part of a lane: what lies on several can decode only where all are idle."""
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000), (2, 20_000))
    short = begun("short", 3000, (1, 500), arrival=NOW - 20)
    (step,) = [s for s in prefills(plan(lane, short)) if "short" in step_requests(s)]
    (shares,) = [p.shares for p in step.keep if p.request == "short"]
    assert {share.instance for share in shares} == {1}


class DearHistory(AnalyticCost):
    """Every chunk reads its history, however short it is."""

    def prefill(self, degree: int, chunks: Sequence[ChunkWork]) -> float:
        read = 1e-6 * sum(chunk.history for chunk in chunks)
        return super().prefill(degree, chunks) + read / degree


def test_no_long_prompt_begins_while_one_that_is_begun_is_passed_over() -> None:
    """There is time for a first part of it, but not for one that reads so much history."""
    lane = begun("long", 180_000, *((i, 40_000) for i in range(3)), arrival=NOW - 100)
    rows = [decoding(f"d{i}", (i, 70_000), due_in=0.3) for i in range(3)]
    found = plan(lane, *rows, waiting("new", 150_000), cost=DearHistory())
    assert {step.group for step in found.steps} == {(0,), (1,), (2,)}, "they decode"
    waits = dict(found.reasons)
    assert waits["long"] == DUE
    assert not prefills(found)


def test_decodes_stay_if_they_would_be_too_slow_together() -> None:
    lane = begun("long", 180_000, (0, 20_000), (1, 20_000), (2, 20_000))
    crowd = [decoding(f"e{i}", (3, 1000)) for i in range(150)]
    found = plan(lane, decoding("d", (1, 3000)), *crowd)
    assert not any(isinstance(step, MigrateStep) for step in found.steps)


# ---- settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "elastic:decode_s=0",
        "elastic:chunk_s=-1",
        "elastic:floor_s=-1",
        "elastic:headroom=-1",
    ],
)
def test_wrong_settings_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=text.partition(":")[2].partition("=")[0]):
        create_policy(text, AnalyticCost())


def test_kv_is_spread_evenly_over_what_there_is() -> None:
    view = begun("a", 1000, (0, 64), (1, 0))
    assert spread(view, [0, 1, 2], [100, 100, 100], 20, 16) == {0: 4, 1: 8, 2: 8}
    assert spread(view, [0, 1], [5, 5, 5], 10, 16) == {0: 5, 1: 5}
    assert spread(view, [0], [9], 3, 16) == {0: 3}
    tight = spread(view, [0, 1, 2], [100, 2, 100], 20, 16)
    assert tight[1] == 2
    assert abs(4 + tight[0] - tight[2]) <= 2
