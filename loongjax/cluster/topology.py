"""Which groups of instances exist: every subset, runs of neighbours, or aligned slices.

Owns nothing but the rules; a topology is a small frozen value that can be pickled and hashed.
Promises: groups ascend, the same question gets the same answer, and no answer but `groups`
takes longer than O(instances), so that 256 of them are no trouble. Pure Python, no jax.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from math import comb
from typing import overload

from loongjax.errors import ConfigError
from loongjax.plan import Group, InstanceId, Topology


@dataclass(frozen=True, slots=True, init=False)
class _Base:
    """A number of instances and the degrees at which they may work together."""

    instances: int
    degrees: tuple[int, ...]

    def __init__(self, instances: int, degrees: Iterable[int] | None = None) -> None:
        """`degrees` lie in [1, instances]; repeats collapse. None: all that have groups.

        Raises ConfigError for a degree out of range, or none at all.
        """
        if instances < 1:
            raise ConfigError(f"a cluster needs at least 1 instance, not {instances}")
        chosen = sorted(set(self._all_degrees(instances) if degrees is None else degrees))
        if not chosen:
            raise ConfigError(
                "degrees are empty, so that no group exists; name at least one, or leave degrees "
                "out to have all"
            )
        for degree in chosen:
            if not 1 <= degree <= instances:
                raise ConfigError(
                    f"degree {degree} is not in [1, {instances}], the number of instances; add "
                    "instances or leave it out"
                )
        object.__setattr__(self, "instances", instances)
        object.__setattr__(self, "degrees", tuple(chosen))

    @staticmethod
    def _all_degrees(instances: int) -> Iterable[int]:
        return range(1, instances + 1)

    def _names(self, group: Group) -> bool:
        """Whether this ascends within range and has a degree that exists."""
        return (
            len(group) in self.degrees
            and group[0] >= 0
            and group[-1] < self.instances
            and all(a < b for a, b in pairwise(group))
        )

    def _open(
        self, instances: frozenset[InstanceId], allowed: frozenset[InstanceId] | None
    ) -> frozenset[InstanceId] | None:
        """Instances that a cover may use; None if `instances` are not among them."""
        everything = _everything(self.instances)
        usable = everything
        if allowed is not None:
            usable = allowed if allowed <= everything else everything & allowed
        return usable if instances <= usable else None


@dataclass(frozen=True, slots=True, init=False)
class EverySubset(_Base):
    """Any instances may form a group. For emulated devices, where links do not matter."""

    def groups(self, degree: int) -> Sequence[Group]:
        """All groups of this degree, made one by one as they are asked for."""
        return _Subsets(self.instances, degree) if degree in self.degrees else ()

    def contains(self, group: Group) -> bool:
        """Whether this exact group exists."""
        return self._names(group)

    def smallest_cover(
        self,
        instances: frozenset[InstanceId],
        allowed: frozenset[InstanceId] | None = None,
        degree: int = 1,
    ) -> Group | None:
        """See `Topology`. What is added to `instances` are the lowest allowed ids."""
        usable = self._open(instances, allowed)
        if usable is None:
            return None
        least = max(len(instances), degree)
        size = next((d for d in self.degrees if least <= d <= len(usable)), None)
        if size is None:
            return None
        added = sorted(usable - instances)[: size - len(instances)]
        return tuple(sorted([*instances, *added]))


@dataclass(frozen=True, slots=True, init=False)
class Neighbours(_Base):
    """Runs of neighbours on the ring of instances: at most one group per start and degree.

    The default on GPU with many instances: every distinct group costs communicators.
    """

    def groups(self, degree: int) -> Sequence[Group]:
        """All groups of this degree, by their first instance on the ring."""
        return _runs(degree, self.instances) if degree in self.degrees else ()

    def contains(self, group: Group) -> bool:
        """Whether this exact group exists."""
        if not self._names(group):
            return False
        breaks = sum(b - a != 1 for a, b in pairwise(group))
        wraps = group[0] == 0 and group[-1] == self.instances - 1
        return breaks == 0 or (breaks == 1 and wraps)

    def smallest_cover(
        self,
        instances: frozenset[InstanceId],
        allowed: frozenset[InstanceId] | None = None,
        degree: int = 1,
    ) -> Group | None:
        """See `Topology`. Among equals, the run with the lowest start on the ring."""
        usable = self._open(instances, allowed)
        if usable is None:
            return None
        if not instances:
            return self._anywhere(_bits(usable), degree)
        ring, ids, best = self.instances, sorted(instances), None
        for before, first in zip([ids[-1], *ids], ids, strict=False):
            found = self._beyond_gap(_bits(usable), before, first, degree)
            if found is not None and (best is None or found < best):
                best = found
        return None if best is None else _run(best[1], best[0], ring)

    def _anywhere(self, usable: int, degree: int) -> Group | None:
        """The first run of at least `degree`: a larger one would have one of that size in it."""
        size = next((size for size in self.degrees if size >= degree), None)
        if size is None:
            return None
        starts = _arc_starts(usable, size, self.instances)
        return _run((starts & -starts).bit_length() - 1, size, self.instances) if starts else None

    def _beyond_gap(
        self, usable: int, before: InstanceId, first: InstanceId, degree: int
    ) -> tuple[int, int] | None:
        """Size and start of the smallest run from `first` round the ring to `before`, and of at
        least `degree`: what it lacks comes from the gap between them, from both ends.
        """
        ring = self.instances
        least = (before - first) % ring + 1
        gap = ring - least
        right, arc = _rotate(usable, before + 1, ring), _rotate(usable, first, ring)
        if arc & ((1 << least) - 1) != (1 << least) - 1:
            return None
        after = min(gap, ((right + 1) & ~right).bit_length() - 1)
        ahead = min(gap, ring - (~arc & ((1 << ring) - 1)).bit_length())
        place = bisect_left(self.degrees, max(least, degree))
        if place == len(self.degrees) or self.degrees[place] > least + min(gap, after + ahead):
            return None
        size = self.degrees[place]
        most = min(ahead, size - least)
        fewest = max(0, size - least - after)
        return size, 0 if fewest <= first <= most else (first - most) % ring


@dataclass(frozen=True, slots=True, init=False)
class AlignedSlices(_Base):
    """Power-of-two slices that start at multiples of their size: for 8, 8 + 4 + 2 + 1.

    For TPU, where routing is compiled in and each group has a program of its own.
    """

    def __init__(self, instances: int, degrees: Iterable[int] | None = None) -> None:
        """As the others; a degree that is no power of two is refused too."""
        _Base.__init__(self, instances, degrees)
        for degree in self.degrees:
            if degree & (degree - 1):
                raise ConfigError(
                    f"degree {degree} is no power of two; aligned slices have degrees "
                    f"{tuple(self._all_degrees(instances))} here. Leave it out"
                )

    @staticmethod
    def _all_degrees(instances: int) -> Iterable[int]:
        return _powers_of_two(instances)

    def groups(self, degree: int) -> Sequence[Group]:
        """All groups of this degree, ascending."""
        if degree not in self.degrees:
            return ()
        starts = range(0, self.instances - degree + 1, degree)
        return tuple(tuple(range(start, start + degree)) for start in starts)

    def contains(self, group: Group) -> bool:
        """Whether this exact group exists."""
        return (
            self._names(group)
            and group[0] % len(group) == 0
            and group[-1] - group[0] == len(group) - 1
        )

    def smallest_cover(
        self,
        instances: frozenset[InstanceId],
        allowed: frozenset[InstanceId] | None = None,
        degree: int = 1,
    ) -> Group | None:
        """See `Topology`. Among equals, the lowest ids."""
        usable = self._open(instances, allowed)
        if usable is None:
            return None
        for size in self.degrees:
            if size < max(degree, len(instances)):
                continue
            starts: Iterable[int] = range(0, self.instances - size + 1, size)
            if instances:
                first = min(instances) // size * size
                starts = [first] if max(instances) < first + size <= self.instances else []
            for start in starts:
                group = range(start, start + size)
                if usable.issuperset(group):
                    return tuple(group)
        return None


_FEW = 4
"""Instances on GPU of which every subset is a group: 15 groups, where neighbours are 13."""

_PLATFORMS: dict[str, type[EverySubset | Neighbours | AlignedSlices]] = {
    "cpu": EverySubset,
    "gpu": Neighbours,
    "tpu": AlignedSlices,
}


def default_topology(
    platform: str, instances: int, degrees: tuple[int, ...] | None = None
) -> Topology:
    """The topology that suits a jax platform.

    Args:
      platform: `cpu`, `gpu` or `tpu`.
      instances: How many elastic instances there are.
      degrees: Degrees to allow. None: all that have groups, but on emulated devices (`cpu`) the
        powers of two and `instances`: there each degree costs minutes of compiling.

    Raises:
      ConfigError: An unknown platform, or a degree that has no groups there.
    """
    kind = _PLATFORMS.get(platform)
    if kind is Neighbours and instances <= _FEW:
        kind = EverySubset
    if kind is None:
        raise ConfigError(
            f"no topology is known for platform {platform!r}; it must be one of "
            f"{', '.join(_PLATFORMS)}"
        )
    if degrees is None and platform == "cpu":
        degrees = (*_powers_of_two(instances), instances)
    return kind(instances, degrees)


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


class _Subsets(Sequence[Group]):
    """All subsets of one size, in lexicographic order, never held in memory.

    Python refuses `len` beyond `sys.maxsize`; indexing and iteration work then too.
    """

    def __init__(self, instances: int, size: int) -> None:
        self._instances = instances
        self._size = size

    def __len__(self) -> int:
        return comb(self._instances, self._size)

    def __iter__(self) -> Iterator[Group]:
        return combinations(range(self._instances), self._size)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | Sequence[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(comb(self._instances, self._size))[index]]
        rank = range(comb(self._instances, self._size))[index]
        chosen: list[int] = []
        candidate = 0
        while len(chosen) < self._size:
            rest = comb(self._instances - candidate - 1, self._size - len(chosen) - 1)
            if rank < rest:
                chosen.append(candidate)
            else:
                rank -= rest
            candidate += 1
        return tuple(chosen)


def _run(start: InstanceId, size: int, ring: int) -> Group:
    return tuple(sorted((start + step) % ring for step in range(size)))


@lru_cache(maxsize=1024)
def _runs(size: int, ring: int) -> tuple[Group, ...]:
    starts = 1 if size == ring else ring
    return tuple(_run(start, size, ring) for start in range(starts))


@lru_cache(maxsize=64)
def _everything(instances: int) -> frozenset[InstanceId]:
    return frozenset(range(instances))


@lru_cache(maxsize=1024)
def _bits(instances: frozenset[InstanceId]) -> int:
    return sum(1 << instance for instance in instances)


def _rotate(bits: int, by: int, ring: int) -> int:
    """Bit `s` of the result is bit `s + by`, round the ring."""
    by %= ring
    return (bits >> by | bits << (ring - by)) & ((1 << ring) - 1)


def _arc_starts(members: int, length: int, ring: int) -> int:
    """Bit `s`: the `length` instances from `s` on, round the ring, are all members.

    O(log length) operations on integers of `ring` bits, by doubling.
    """
    starts = (1 << ring) - 1
    done, size, arcs = 0, 1, members  # `arcs`: starts of arcs of `size` members
    while length:
        if length & 1:
            starts &= _rotate(arcs, done, ring)
            done += size
        arcs &= _rotate(arcs, size, ring)
        size *= 2
        length >>= 1
    return starts
