"""Every hop of the ring is one link of a TPU's mesh, in every aligned slice."""

from __future__ import annotations

from itertools import product

import pytest

from loongjax.cluster.ring import ring_order
from loongjax.cluster.topology import AlignedSlices


@pytest.mark.parametrize("mesh", [(1,), (2,), (2, 2), (2, 4), (4, 4), (2, 2, 2), (2, 2, 4)])
def test_every_hop_is_one_link(mesh):
    coords = list(product(*map(range, mesh)))
    order = ring_order(coords)
    assert order is not None
    assert sorted(order) == list(range(len(coords)))
    topology = AlignedSlices(len(coords))
    for degree in topology.degrees:
        for group in topology.groups(degree):
            for rank in range(degree if degree > 1 else 0):
                a, b = (coords[order[group[at % degree]]] for at in (rank, rank + 1))
                assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) == 1, (group, rank)


@pytest.mark.parametrize("mesh", [(4,), (1, 8)])
def test_a_line_of_chips_has_no_ring(mesh):
    assert ring_order(list(product(*map(range, mesh)))) is None
