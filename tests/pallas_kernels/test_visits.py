"""Visits name every row with entries once, and rows of a visit read the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.paged_attention import RowTables
from pallas_kernels.visits import visits


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9),
    tile=st.integers(1, 4),
)
def test_visits_cover_the_rows_of_each_tile(rows, tile):
    start, entries = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    unused = np.zeros(len(rows), np.int32)
    found = visits(RowTables(np.zeros((1, 3), np.int32), start, entries, unused, unused), tile)
    begin, visit = np.asarray(found.begin_I), np.asarray(found.visit_R)
    assert len(begin) == -(-len(rows) // tile) + 1
    assert len(found.start_V) > begin[-1]
    for row, wanted in enumerate(rows):
        at = visit[row]
        if wanted[1] == 0:
            assert at == -1
            continue
        assert (found.start_V[at], found.entries_V[at]) == wanted
        assert begin[row // tile] <= at < begin[row // tile + 1]
    of_tiles = {(row // tile, at) for row, at in enumerate(visit) if at >= 0}
    assert len(of_tiles) == begin[-1]  # none that nobody needs
    neighbours = zip(rows, rows[1:], visit, visit[1:], range(1, len(rows)), strict=False)
    for one, other, at, next_at, row in neighbours:
        if one == other and one[1] and row % tile:
            assert at == next_at
