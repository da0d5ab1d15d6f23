from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.costmodel import ChunkWork, CorrectedCost, CostModel, DecodeWork
from loongjax.errors import ConfigError
from tests.costmodel.sibs import toy_sib

CHUNKS = [ChunkWork(1_000, 0)]
WORK = DecodeWork(rows=4, kv_tokens=4_000, masters=1)


def test_it_learns_how_much_slower_a_kind_and_degree_is():
    base = toy_sib()
    cost = CorrectedCost(base)
    assert isinstance(cost, CostModel)
    for _ in range(100):
        predicted = cost.prefill(2, CHUNKS)
        cost.observe("prefill", 2, predicted=predicted, measured=1.5 * base.prefill(2, CHUNKS))
    assert cost.prefill(2, CHUNKS) == pytest.approx(1.5 * base.prefill(2, CHUNKS), rel=1e-3)
    assert cost.prefill(4, CHUNKS) == base.prefill(4, CHUNKS)
    assert cost.decode(2, WORK) == base.decode(2, WORK)
    assert cost.migrate(100) == base.migrate(100)


@given(st.lists(st.floats(0.0, 1e9), max_size=50))
def test_whatever_it_sees_it_stays_in_bounds(measured):
    cost = CorrectedCost(toy_sib(), bound=2.0, rate=1.0)
    for seconds in measured:
        cost.observe("decode", 1, predicted=cost.decode(1, WORK), measured=seconds)
        assert 0.5 - 1e-9 <= cost.factor("decode", 1) <= 2.0 + 1e-9


def test_one_stalled_step_moves_it_little():
    cost = CorrectedCost(toy_sib())
    cost.observe("decode", 1, predicted=0.01, measured=60.0)
    assert cost.factor("decode", 1) < 1.2


@pytest.mark.parametrize(("bound", "rate"), [(0.9, 0.1), (2.0, 0.0), (2.0, 1.1)])
def test_senseless_settings_are_refused(bound, rate):
    with pytest.raises(ConfigError, match="at least 1"):
        CorrectedCost(toy_sib(), bound=bound, rate=rate)
