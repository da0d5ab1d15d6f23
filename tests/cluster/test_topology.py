"""Groups of every topology, against brute force over all subsets."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours, default_topology
from loongjax.errors import ConfigError
from loongjax.plan import Group, Topology

KINDS = (EverySubset, Neighbours, AlignedSlices)


def all_groups(topology: Topology) -> list[Group]:
    return [group for degree in topology.degrees for group in topology.groups(degree)]


def any_topology(data: st.DataObject) -> Topology:
    kind = data.draw(st.sampled_from(KINDS))
    instances = data.draw(st.integers(1, 9))
    possible = kind(instances).degrees
    return kind(instances, data.draw(st.none() | st.sets(st.sampled_from(possible), min_size=1)))


@given(st.data())
def test_groups_are_exactly_what_contains_accepts(data: st.DataObject) -> None:
    topology = any_topology(data)
    subsets = [
        subset
        for size in range(topology.instances + 1)
        for subset in combinations(range(topology.instances), size)
    ]
    groups = all_groups(topology)
    assert len(groups) == len(set(groups))
    assert set(groups) == {subset for subset in subsets if topology.contains(subset)}
    assert all(topology.groups(degree) for degree in topology.degrees)
    assert not topology.groups(topology.instances + 1)


@given(st.data())
def test_cover_is_a_smallest_group_that_holds_what_is_asked(data: st.DataObject) -> None:
    topology = any_topology(data)
    ids = st.integers(0, topology.instances - 1)
    instances = data.draw(st.frozensets(ids, max_size=4))
    allowed = data.draw(st.none() | st.frozensets(ids))
    degree = data.draw(st.integers(1, topology.instances))
    fitting = [
        group
        for group in all_groups(topology)
        if len(group) >= degree
        and instances.issubset(group)
        and (allowed is None or allowed.issuperset(group))
    ]
    cover = topology.smallest_cover(instances, allowed, degree)
    if fitting:
        assert cover in fitting
        assert len(cover) == min(map(len, fitting))
        if isinstance(topology, Neighbours):  # the lowest start on the ring
            assert cover == next(group for group in fitting if len(group) == len(cover))
    else:
        assert cover is None


@pytest.mark.parametrize("kind", KINDS)
def test_ids_out_of_range_are_in_no_group(kind: type[EverySubset]) -> None:
    topology = kind(4)
    assert not topology.contains((3, 4))
    assert not topology.contains((-1, 0))
    assert not topology.contains((1, 0))
    assert not topology.contains((0, 0))
    assert not topology.contains(())
    assert topology.smallest_cover(frozenset({4})) is None
    assert topology.smallest_cover(frozenset(), frozenset({4, 5})) is None


def test_neighbours_wrap_round_the_ring() -> None:
    assert Neighbours(4).groups(2) == ((0, 1), (1, 2), (2, 3), (0, 3))
    assert Neighbours(4).groups(4) == ((0, 1, 2, 3),)
    assert Neighbours(6).smallest_cover(frozenset({0, 5})) == (0, 5)
    assert Neighbours(6).smallest_cover(frozenset({0, 3})) == (0, 1, 2, 3)
    assert Neighbours(6).smallest_cover(frozenset({0, 3}), frozenset({3, 4, 5, 0})) == (0, 3, 4, 5)


def test_eight_instances_have_fifteen_aligned_slices() -> None:
    assert len(all_groups(AlignedSlices(8))) == 8 + 4 + 2 + 1
    assert AlignedSlices(8).smallest_cover(frozenset({3, 4})) == tuple(range(8))
    assert AlignedSlices(6).smallest_cover(frozenset({4, 5})) == (4, 5)
    assert AlignedSlices(6).smallest_cover(frozenset({3, 4})) is None


def test_cover_is_filled_with_the_lowest_allowed_ids() -> None:
    topology = EverySubset(8, (1, 4))
    assert topology.smallest_cover(frozenset({5, 6})) == (0, 1, 5, 6)
    assert topology.smallest_cover(frozenset({5}), frozenset({2, 3, 4, 5, 7}), 2) == (2, 3, 4, 5)


def test_degree_one_may_be_missing() -> None:
    for kind in KINDS:
        topology = kind(4, (2,))
        assert not topology.contains((0,))
        assert len(topology.smallest_cover(frozenset({1}))) == 2
        assert topology.smallest_cover(frozenset({1}), frozenset({1})) is None


@given(st.integers(1, 12), st.data())
def test_subsets_have_the_order_of_combinations(instances: int, data: st.DataObject) -> None:
    degree = data.draw(st.integers(1, instances))
    groups = EverySubset(instances).groups(degree)
    expected = list(combinations(range(instances), degree))
    assert list(groups) == expected
    assert [groups[i] for i in range(len(groups))] == expected
    assert groups[-1] == expected[-1]
    assert groups[1:4] == expected[1:4]
    with pytest.raises(IndexError):
        groups[len(expected)]


@pytest.mark.parametrize("kind", KINDS)
def test_256_instances_are_no_trouble(kind: type[EverySubset]) -> None:
    began = time.process_time()
    topology = kind(256)
    assert topology.smallest_cover(frozenset({200, 201})) == (200, 201)
    assert topology.smallest_cover(frozenset({0, 128})) is not None
    assert topology.smallest_cover(frozenset(), frozenset(range(0, 256, 2)), 129) is None
    assert topology.contains(tuple(range(256)))
    assert topology.groups(2)[0] == (0, 1)
    assert time.process_time() - began < 2  # enumerating 2**256 groups would not end


@pytest.mark.parametrize("kind", KINDS)
def test_topology_is_a_value(kind: type[EverySubset]) -> None:
    topology = kind(8, (4, 2, 2))
    assert topology.degrees == (2, 4)
    assert pickle.loads(pickle.dumps(topology)) == topology == kind(8, (2, 4))
    assert hash(topology) == hash(kind(8, (2, 4)))
    assert topology != kind(8)
    with pytest.raises(AttributeError):
        topology.instances = 9


def test_default_suits_the_platform() -> None:
    assert default_topology("cpu", 6, None) == EverySubset(6, (1, 2, 4, 6))
    assert default_topology("cpu", 8, None) == EverySubset(8, (1, 2, 4, 8))
    assert default_topology("cpu", 1, None) == EverySubset(1, (1,))
    assert default_topology("cpu", 4, (1, 3)) == EverySubset(4, (1, 3))
    assert default_topology("gpu", 4, None) == EverySubset(4)
    assert default_topology("gpu", 6, (1, 2)) == Neighbours(6, (1, 2))
    assert default_topology("tpu", 6, None) == AlignedSlices(6, (1, 2, 4))
    with pytest.raises(ConfigError, match="'vpu'; it must be one of cpu, gpu, tpu"):
        default_topology("vpu", 6, None)


def test_bad_degrees_are_refused() -> None:
    for kind in KINDS:
        with pytest.raises(ConfigError, match=r"degree 8 is not in \[1, 4\]"):
            kind(4, (1, 8))
        with pytest.raises(ConfigError, match=r"degree 0 is not in \[1, 4\]"):
            kind(4, (0,))
        with pytest.raises(ConfigError, match="degrees are empty"):
            kind(4, ())
        with pytest.raises(ConfigError, match="at least 1 instance, not 0"):
            kind(0)
    with pytest.raises(ConfigError, match=r"degree 3 is no power of two.*\(1, 2, 4\)"):
        default_topology("tpu", 6, (1, 3))


def test_topology_imports_no_jax() -> None:
    code = "import loongjax.cluster.topology, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
