"""Step 4 of LoongServe: groups shrink after prefill and grow while they decode."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.costmodel.protocol import DecodeWork
from loongjax.plan import RequestView, Share
from loongjax.scheduler.scaling import (
    Need,
    Room,
    choose_masters,
    masters_needed,
    scale_down,
    scale_up,
    shares,
    smallest_part,
)
from tests.scheduler.analytic_cost import AnalyticCost

COST = AnalyticCost()


def rooms(*spare: int, decoding: tuple[int, ...] = ()) -> list[Room]:
    return [Room(instance=i, spare=blocks, decodes=i in decoding) for i, blocks in enumerate(spare)]


# ---- down ----------------------------------------------------------------------------

needs_and_rooms = st.tuples(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=5),
)


@given(needs_and_rooms)
def test_all_kv_is_kept_with_room_to_grow(
    case: tuple[list[tuple[int, int]], list[tuple[int, bool]]],
) -> None:
    needs = [Need(now, now + growth) for now, growth in case[0]]
    group = [Room(instance=i, spare=n, decodes=d) for i, (n, d) in enumerate(case[1])]
    if sum(need.later for need in needs) > sum(room.spare for room in group):
        return
    found = scale_down(needs, group)
    taken = Counter[int]()
    for need, pieces in zip(needs, found, strict=True):
        assert sum(blocks for _, blocks in pieces) == need.now
        assert all(blocks > 0 for _, blocks in pieces)
        taken.update(dict(pieces))
    part = smallest_part(needs, group)
    spare = {room.instance: room.spare for room in part}
    assert taken.keys() <= spare.keys()
    assert all(blocks <= spare[instance] for instance, blocks in taken.items())
    roomiest = sorted((room.spare for room in group), reverse=True)
    later = sum(need.later for need in needs)
    assert sum(roomiest[: len(part) - 1]) < later <= sum(spare.values())


def test_kv_joins_who_decodes_already() -> None:
    assert scale_down([Need(4, 6)], rooms(9, 7, 9, decoding=(1,))) == [[(1, 4)]]
    assert scale_down([Need(4, 8)], rooms(9, 7, 9, decoding=(1,))) == [[(0, 4)]]


def test_long_kv_is_split_and_ends_where_room_is_left() -> None:
    assert scale_down([Need(12, 16)], rooms(8, 10)) == [[(1, 10), (0, 2)]]


def test_shares_are_full_blocks_but_the_last() -> None:
    assert shares([(2, 3), (0, 2)], 17, 4) == (Share(2, 12), Share(0, 5))


# ---- up ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "kv", "degree"),
    [(1, 100, 1), (4, 400_000, 4), (400, 4_000, 3), (1, 20_000, 1)],
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
