"""Step 1 of LoongServe: how many of the requests in line are begun."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.costmodel.protocol import ChunkWork
from loongjax.scheduler.dispatch import (
    Occupied,
    Openings,
    Pool,
    Prompt,
    compute_allows,
    dispatch,
    memory_allows,
    peak_of_future_kv,
    tipping_point,
)
from tests.scheduler.analytic_cost import AnalyticCost

COST = AnalyticCost()
DEGREES = (1, 2, 3, 4)

holders = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=8)


def pool(capacity: int, held: Sequence[tuple[int, int]] = (), block_size: int = 1) -> Pool:
    numbers = np.array(held, np.int64).reshape(-1, 2)
    return Pool(capacity=capacity, block_size=block_size, held=numbers[:, 0], left=numbers[:, 1])


def prompt(tokens: int, growth: int = 0) -> Prompt:
    return Prompt(tokens, growth, tokens + growth)


def openings(free: int, *occupied: Occupied, wait: float = 0.0, blocks: int = 10_000) -> Openings:
    return Openings(free=free, blocks=blocks if free else 0, occupied=occupied, wait=wait)


def begun(
    line: Sequence[Prompt],
    behind: float,
    memory: Pool | None,
    found: Openings,
    degrees: Sequence[int],
    cost: AnalyticCost,
) -> int:
    tip = tipping_point(degrees[0], cost)
    return dispatch(line, behind, memory, found, degrees, cost, tip=tip)


# ---- memory --------------------------------------------------------------------------


def peak_by_growing(held: Sequence[tuple[int, int]], size: int) -> int:
    """Everyone grows by a token at a time and leaves at its end; each end is padded to a block
    from the start, as the test counts it.
    """
    padded = [(tokens + -(tokens + left) % size, left) for tokens, left in held]
    longest = max((left for _, left in padded), default=0)
    return max(
        sum(tokens + time for tokens, left in padded if left >= time) for time in range(longest + 1)
    )


@given(holders, st.sampled_from([1, 4, 16]))
def test_peak_is_what_growing_in_step_comes_to(held: list[tuple[int, int]], size: int) -> None:
    numbers = np.array(held, np.int64).reshape(-1, 2)
    assert peak_of_future_kv(numbers[:, 0], numbers[:, 1], size) == peak_by_growing(held, size)


@given(holders, holders, st.integers(0, 400), st.sampled_from([1, 4]))
def test_memory_allows_as_many_as_fit_in_line(
    held: list[tuple[int, int]], line: list[tuple[int, int]], capacity: int, size: int
) -> None:
    got = memory_allows([prompt(*each) for each in line], pool(capacity, held, size))
    fits = [
        peak_by_growing([*held, *line[:count]], size) <= capacity for count in range(len(line) + 1)
    ]
    assert got == max((count for count, good in enumerate(fits) if good), default=0)


# ---- compute -------------------------------------------------------------------------


def test_beyond_the_tipping_point_time_grows_with_tokens() -> None:
    tip = tipping_point(1, COST)
    times = [COST.prefill(1, [ChunkWork(tokens, 0)]) for tokens in (tip // 2, tip, 2 * tip)]
    assert times[2] / times[1] >= 1.8 > times[1] / times[0]


@pytest.mark.parametrize(
    ("lengths", "instances", "count"),
    [
        ([5, 5, 5], 0, 0),
        ([10, 10, 10, 10], 2, 2),
        ([4, 4, 4, 4, 4, 4], 2, 5),
        ([1000, 10, 10], 1, 1),
        ([1000, 10, 10], 2, 2),  # one runs beside the long one
        ([1000, 1000], 4, 1),
    ],
)
def test_compute_allows_a_tipping_point_for_each_instance(
    lengths: list[int], instances: int, count: int
) -> None:
    assert compute_allows(lengths, instances, 10) == count


# ---- all three -----------------------------------------------------------------------


def test_nobody_overtakes_a_request_without_memory() -> None:
    line = [prompt(10), prompt(500), prompt(10)]
    assert begun(line, 0.0, pool(100), openings(4), DEGREES, COST) == 1
    assert begun(line, 0.0, pool(1000), openings(4), DEGREES, COST) == 3


@pytest.mark.parametrize(
    ("wait", "weight", "migrate", "count"),
    [
        (0.001, 1.0, math.inf, 0),  # nothing to be gained
        (10.0, 0.001, math.inf, 1),
        (10.0, 1e9, math.inf, 0),  # dear to pause
        (10.0, 1e9, 1e-12, 1),  # and cheap to move
    ],
)
def test_decodes_give_way_if_that_gains_more_than_it_costs(
    wait: float, weight: float, migrate: float, count: int
) -> None:
    found = openings(0, Occupied(weight, migrate, 1000), wait=wait)
    assert begun([prompt(100)], 0.0, None, found, (1,), COST) == count


def test_decodes_are_not_paused_for_memory_unless_that_gains_more() -> None:
    """There is a free instance, but it does not hold the prompt."""
    dear, cheap = (Occupied(weight, math.inf, 80) for weight in (1e9, 1e-6))
    for occupied, count in ((dear, 0), (cheap, 1)):
        found = openings(1, occupied, wait=10.0, blocks=30)
        assert begun([prompt(100)], 0.0, None, found, DEGREES, COST) == count


def test_those_behind_in_line_wait_too() -> None:
    """Alone it would not be worth the pause."""
    delay = COST.prefill(1, [ChunkWork(100, 0)])
    found = openings(0, Occupied(1.0, math.inf, 1000), wait=delay)
    assert begun([prompt(100)], 0.0, None, found, (1,), COST) == 0
    assert begun([prompt(100)], 2.0, None, found, (1,), COST) == 1


def test_without_instances_nobody_is_begun() -> None:
    assert begun([prompt(100)], 0.0, None, openings(0), DEGREES, COST) == 0
