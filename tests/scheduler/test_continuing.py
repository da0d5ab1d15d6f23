"""Which decodes of LoongServe go on by themselves: none that anybody waits for."""

from __future__ import annotations

import pytest

from tests.scheduler.analytic_cost import AnalyticCost
from tests.scheduler.test_loongserve import decoding, plan, waiting


def test_decodes_go_on_while_there_is_nothing_to_decide() -> None:
    assert plan(decoding("a", (0, 100)), decoding("b", (1, 90), (2, 90))).ahead == {(0,), (1, 2)}


def test_those_in_flight_go_on_where_nothing_is_idle() -> None:
    views = [decoding(f"d{i}", (i, 100), last_seq=9) for i in range(4)]
    going = plan(*views, busy=dict.fromkeys(range(4), 9)).ahead
    assert going == frozenset(), "four that share a step, but no KV, are planned apart"
    views = [decoding(f"d{i}", (i, 100), last_seq=6 + i) for i in range(4)]
    assert plan(*views, busy={i: 6 + i for i in range(4)}).ahead == {(0,), (1,), (2,), (3,)}


def test_a_prompt_that_could_pause_them_is_asked_for_after_every_step() -> None:
    views = [decoding(f"d{i}", (i, 1_000), generated=9, last_seq=6 + i) for i in range(4)]
    busy = {i: 6 + i for i in range(4)}
    assert plan(*views, waiting("w", 100), busy=busy).ahead == frozenset()


def test_memory_alone_is_no_reason_to_ask_again() -> None:
    full = decoding("d", (0, 90), (1, 60), max_tokens=51)
    found = plan(full, waiting("a", 80), instances=2, slots=100, headroom=0)
    assert found.ahead == {(0, 1)}


def test_nobody_goes_on_beside_one_without_a_turn() -> None:
    """`b` could decode on instance 0, were it idle."""
    views = [decoding("a", (0, 100), last_seq=9), decoding("b", (0, 90), last_seq=3)]
    assert plan(*views, busy={0: 9}).ahead == frozenset()


@pytest.mark.parametrize(("row", "ahead"), [(8e-5, {(0,)}), (8e-2, set())])
def test_a_group_that_would_grow_is_planned_anew(row: float, ahead: set) -> None:
    views = [decoding(f"d{i}", (0, 100), last_seq=9) for i in range(8)]
    assert plan(*views, busy={0: 9}, cost=AnalyticCost(row=row)).ahead == ahead
