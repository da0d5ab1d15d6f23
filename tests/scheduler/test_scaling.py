"""Step 4 of LoongServe: groups shrink after prefill and grow while they decode."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.cluster.topology import EverySubset, Neighbours
from loongjax.costmodel.protocol import DecodeWork
from loongjax.plan import RequestView, Share
from loongjax.scheduler.scaling import (
    Need,
    Pace,
    Room,
    choose_masters,
    masters_needed,
    scale_down,
    scale_up,
    shares,
    smallest_part,
    tokens_in_time,
)
from tests.scheduler.analytic_cost import AnalyticCost

COST = AnalyticCost()


ANY = EverySubset(5)
UNHURRIED = Pace(limit_s=1.0, step_s=lambda blocks: 0.0)


def rooms(*spare: int, decoding: tuple[int, ...] = (), used: int = 0) -> list[Room]:
    return [
        Room(instance=i, spare=blocks, used=used, decodes=i in decoding)
        for i, blocks in enumerate(spare)
    ]


def by_blocks(limit: int) -> Pace:
    """A step takes a second for every block on the fullest instance."""
    return Pace(limit_s=float(limit), step_s=float)


# ---- down ----------------------------------------------------------------------------

needs_and_rooms = st.tuples(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=5),
)


@given(needs_and_rooms, st.integers(1, 40), st.sampled_from([EverySubset, Neighbours]))
def test_all_kv_is_kept_with_room_to_grow(
    case: tuple[list[tuple[int, int]], list[tuple[int, bool]]],
    limit: int,
    kind: type[EverySubset | Neighbours],
) -> None:
    needs = [Need(now, now + growth) for now, growth in case[0]]
    group = [Room(instance=i, spare=n, used=30 - n, decodes=d) for i, (n, d) in enumerate(case[1])]
    later = sum(need.later for need in needs)
    if later > sum(room.spare for room in group):
        return
    topology = kind(5)
    found = scale_down(needs, group, by_blocks(limit), topology)
    taken = Counter[int]()
    for need, pieces in zip(needs, found, strict=True):
        assert sum(blocks for _, blocks in pieces) == need.now
        assert all(blocks > 0 for _, blocks in pieces)
        taken.update(dict(pieces))
    part = smallest_part(needs, group, by_blocks(limit), topology)
    spare = {room.instance: room.spare for room in part}
    assert taken.keys() <= spare.keys()
    assert all(blocks <= spare[instance] for instance, blocks in taken.items())
    assert later <= sum(spare.values())
    assert topology.contains(tuple(sorted(spare))) or len(part) == len(group)


@given(needs_and_rooms)
def test_no_smaller_part_would_hold_it(
    case: tuple[list[tuple[int, int]], list[tuple[int, bool]]],
) -> None:
    needs = [Need(now, now + growth) for now, growth in case[0]]
    group = [Room(instance=i, spare=n, used=0, decodes=d) for i, (n, d) in enumerate(case[1])]
    later = sum(need.later for need in needs)
    roomiest = sorted((room.spare for room in group), reverse=True)
    if later <= sum(roomiest):
        part = smallest_part(needs, group, UNHURRIED, ANY)
        assert sum(roomiest[: len(part) - 1]) < later


def test_kv_joins_who_decodes_already() -> None:
    group = rooms(9, 7, 9, decoding=(1,))
    assert scale_down([Need(4, 6)], group, UNHURRIED, ANY) == [[(1, 4)]]
    assert scale_down([Need(4, 8)], group, UNHURRIED, ANY) == [[(0, 4)]]


def test_long_kv_is_split_evenly_and_ends_where_room_is_left() -> None:
    assert scale_down([Need(12, 16)], rooms(8, 10), UNHURRIED, ANY) == [[(0, 5), (1, 7)]]


def test_kv_is_spread_over_as_many_as_read_it_in_time() -> None:
    group = rooms(30, 30, 30, used=1)
    assert scale_down([Need(9, 10)], group, by_blocks(10), ANY) == [[(0, 9)]]
    assert scale_down([Need(9, 10)], group, by_blocks(6), ANY) == [[(0, 5), (1, 4)]]
    # nothing is in time: as many as help
    assert sorted(scale_down([Need(9, 10)], group, by_blocks(1), ANY)[0]) == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]


def test_who_hardly_changes_a_slow_step_is_not_spread() -> None:
    assert scale_down([Need(1, 2)], rooms(30, 30, used=20), by_blocks(5), ANY) == [[(0, 1)]]


def test_kv_is_kept_on_a_group_that_exists() -> None:
    group = rooms(9, 5, 9, 5)
    assert sorted(scale_down([Need(12, 14)], group, UNHURRIED, EverySubset(4))[0]) == [
        (0, 6),
        (2, 6),
    ]
    found = scale_down([Need(12, 14)], group, UNHURRIED, Neighbours(4))[0]
    assert Neighbours(4).contains(tuple(sorted(instance for instance, _ in found)))


@given(st.integers(1, 100_000), st.floats(1e-3, 0.1))
def test_tokens_in_time_are_the_most(most: int, limit_s: float) -> None:
    def step_s(tokens: int) -> float:
        return COST.decode(1, DecodeWork(1, tokens, 1, tokens))

    found = tokens_in_time(limit_s, most, COST)
    assert 0 <= found <= most
    assert not found or step_s(found) <= limit_s
    assert found == most or step_s(found + 2 + found // 32) > limit_s


def test_shares_are_full_blocks_but_the_last() -> None:
    assert shares([(2, 3), (0, 2)], 17, 4) == (Share(2, 12), Share(0, 5))


# ---- up ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "kv", "degree"),
    [(1, 100, 1), (4, 400_000, 1), (400, 4_000, 3), (1, 20_000, 1)],
)
def test_scales_up_if_the_step_gets_quicker(rows: int, kv: int, degree: int) -> None:
    assert scale_up(rows, kv, 1, (1, 2, 3, 4), COST) == degree


@given(st.integers(1, 500), st.integers(1, 800_000), st.integers(1, 4))
def test_never_scales_up_to_a_slower_step(rows: int, kv: int, degree: int) -> None:
    chosen = scale_up(rows, kv, degree, (1, 2, 3, 4), COST)
    times = [COST.decode(d, DecodeWork(rows, kv, min(d, rows))) for d in sorted({degree, chosen})]
    assert chosen >= degree
    assert chosen == degree or times[1] <= 0.9 * times[0]


# ---- masters -------------------------------------------------------------------------


def view(name: str, *kv: tuple[int, int]) -> RequestView:
    computed = sum(tokens for _, tokens in kv)
    return RequestView(
        id=name,
        prompt=computed,
        max_tokens=9,
        arrival=0.0,
        computed=computed,
        generated=1,
        kv=tuple(Share(*share) for share in kv),
    )


@pytest.mark.parametrize(
    ("rows", "least", "masters"), [(1, 1, 1), (256, 1, 4), (3, 1, 3), (9, 2, 4)]
)
def test_as_many_masters_as_make_the_step_quickest(rows: int, least: int, masters: int) -> None:
    assert masters_needed(rows, 100, 4, least, COST) == masters


def test_few_masters_where_more_gain_nothing() -> None:
    assert masters_needed(64, 100, 4, 1, AnalyticCost(row=0.0)) == 1


def test_rows_are_spread_evenly_and_stand_where_most_kv_is() -> None:
    rows = [(view("a", (0, 9), (1, 2)), 0), (view("b", (1, 9)), 1), (view("c", (0, 3), (1, 1)), 0)]
    found = choose_masters(rows, (0, 1, 2), 2)
    assert [(row.request, row.master, row.home) for row in found] == [
        ("a", 0, 0),
        ("b", 1, 1),
        ("c", 0, 0),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_no_master_has_two_rows_more_than_another(
    homes: list[tuple[int, int]], masters: int
) -> None:
    rows = [
        (view(f"r{i}", *sorted({first: 5, second: 2 + i}.items())), first)
        for i, (first, second) in enumerate(homes)
    ]
    found = choose_masters(rows, (0, 1, 2, 3), masters)
    counts = Counter(row.master for row in found)
    assert [row.request for row in found] == [request.id for request, _ in rows]
    assert max(counts.values()) == -(-len(rows) // masters)
    assert len(counts) <= masters
