"""The catalogue is small, and holds whatever a step can ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours
from loongjax.config import EngineConfig
from loongjax.programs.catalogue import Catalogue, compiled_per_group

MAX_CHUNK, MAX_ROWS = 2048, 32


def catalogue(topology=None, *, chunk: int = MAX_CHUNK, rows: int = MAX_ROWS, placed=False):
    topology = topology or EverySubset(4, (1, 2, 4))
    return Catalogue(topology, max_chunk_tokens=chunk, max_rows=rows, placed=placed)


def test_the_demo_needs_at_most_24_programs():
    """Four instances, degrees 1, 2 and 4, context 8,192, and the default limits."""
    found = catalogue(chunk=min(EngineConfig().max_chunk_tokens, 8192)).specs
    assert len(found) == len(set(found)) == len({spec.name for spec in found}) <= 24


def test_limits_are_rounded_up_to_buckets():
    odd = catalogue(chunk=2000, rows=30)
    assert (odd.max_chunk_tokens, odd.max_rows) == (2048, 32)
    assert odd.chunk_buckets == (128, 512, 1024, 2048)
    assert odd.extend_buckets == (512, 2048)
    assert odd.row_buckets == (1, 8, 32)
    assert catalogue(chunk=1, rows=1).chunk_buckets == (128,)


topologies = st.sampled_from(
    [
        (EverySubset(5), False),
        (Neighbours(6, (1, 3, 6)), False),
        (AlignedSlices(8), True),
        (AlignedSlices(6, (2, 4)), True),
    ]
)


@given(data=st.data(), which=topologies, chunk=st.integers(1, 5000), rows=st.integers(1, 200))
def test_what_a_step_asks_for_is_in_it_and_large_enough(data, which, chunk, rows):
    topology, placed = which
    it = catalogue(topology, chunk=chunk, rows=rows, placed=placed)
    degree = data.draw(st.sampled_from(topology.degrees))
    group = data.draw(st.sampled_from(list(topology.groups(degree))))
    tokens = data.draw(st.integers(1, it.max_chunk_tokens))
    decoding = data.draw(st.integers(0, it.max_rows))
    asked = [it.prefill(group, tokens), it.extend(group, tokens), it.decode(group, decoding)]
    assert asked[1].bucket >= asked[0].bucket >= tokens
    assert asked[1].kind == "extend"
    assert asked[2].rows >= decoding
    if degree > 1:
        asked.append(it.migrate(group))
    assert set(asked) <= set(it.specs)
    assert {spec.placement for spec in asked} == {group if placed else None}


def test_programs_that_are_rebound_are_there_once_for_each_degree():
    many, few = catalogue(EverySubset(8, (1, 2))), catalogue(EverySubset(2))
    assert many.specs == few.specs


def test_on_tpu_every_group_has_programs_of_its_own():
    """Eight instances in aligned slices: 8 + 4 + 2 + 1 groups, none rebound to another."""
    assert [compiled_per_group(platform) for platform in ("cpu", "gpu", "tpu")] == [0, 0, 1]
    topology = AlignedSlices(8)
    specs = catalogue(topology, placed=True).specs
    groups = [group for degree in topology.degrees for group in topology.groups(degree)]
    assert len(groups) == 15
    assert {spec.placement for spec in specs} == set(groups)
    kinds = len(catalogue(EverySubset(1)).specs)
    assert len(specs) == len(set(specs)) == 15 * kinds + 7  # groups of several also migrate
    assert all(len(spec.placement) == spec.degree for spec in specs)
    assert len({spec.name for spec in specs}) == len(specs)


@pytest.mark.parametrize("instances", [1, 2, 16])
def test_its_size_does_not_depend_on_the_number_of_instances(instances):
    assert len(catalogue(EverySubset(instances, (1,))).specs) == 7
