"""Where one more request joins batches that decode: the search that policies share.

Who is seated, when, and at whose cost is a policy's own (`decodes`, `seating`). Here is only
which group batches and a request need together, and how it grows by an instance with memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from loongjax.plan import Group, InstanceId, RequestView, Snapshot, Topology

_MOST_DEGREES = 8
"""How many degrees are looked at for a group that might be larger."""


@runtime_checkable
class Batch(Protocol):
    """Requests that decode together.

    Attributes:
      group: Where.
      needed: The part of it with KV of theirs, old or new.
    """

    group: Group
    needed: set[InstanceId]


@runtime_checkable
class Covers(Protocol):
    """What finds groups that exist: the books of a plan that is being made."""

    def cover(
        self, instances: frozenset[InstanceId], usable: frozenset[InstanceId], degree: int = 1
    ) -> Group | None:
        """The smallest group of usable instances, of at least `degree`, that holds these."""
        ...


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat(Generic[B]):
    """A place for one more request.

    Attributes:
      joined: The batches that become one, with this request in it.
      group: Where they then are.
      home: Where the request's next token is kept.
    """

    joined: tuple[B, ...]
    group: Group
    home: InstanceId


def cover_together(
    books: Covers,
    joined: Sequence[Batch],
    homes: frozenset[InstanceId],
    usable: Set[InstanceId],
    least: int,
) -> Group | None:
    """A group of at least `least` for these batches together with a request of these homes."""
    needed = homes.union(*(batch.needed for batch in joined))
    open_to = frozenset(usable).union(*(batch.group for batch in joined))
    return books.cover(needed, open_to, least)


def seat_beside(
    books: Covers,
    joined: tuple[B, ...],
    homes: frozenset[InstanceId],
    usable: Set[InstanceId],
    beside: Sequence[InstanceId],
    least: int,
) -> Seat[B] | None:
    """A seat in the smallest group that also holds one of `beside`; among equals, the first.

    It cannot grow into a corner: in every topology, a group that holds some instances lies
    in a largest group that holds them.
    """
    smallest = max(least, len(homes) + 1)
    best: Seat[B] | None = None
    for home in beside:
        group = cover_together(books, joined, homes | {home}, usable, least)
        if group is not None and (best is None or len(group) < len(best.group)):
            best = Seat(joined=joined, group=group, home=home)
            if len(group) <= smallest:
                break
    return best


def parts(homes: Iterable[frozenset[InstanceId]]) -> list[frozenset[InstanceId]]:
    """The instances of requests with these homes, put together where requests share any: those of
    one part have to decode together, others need not.
    """
    found: list[frozenset[InstanceId]] = []
    for own in homes:
        if own in found:
            continue
        apart = [part for part in found if part.isdisjoint(own)]
        found = [*apart, own.union(*(part for part in found if part not in apart))]
    return found


def groups_in_flight(snapshot: Snapshot, soon: Set[InstanceId]) -> dict[Group, list[RequestView]]:
    """Groups of decode steps in flight on instances that are idle `soon`, each with those who go on
    after the newest of them; groups of which nobody does are left out.
    """
    members: dict[int, list[InstanceId]] = {}
    for instance in snapshot.instances:
        if instance.busy_seq is not None and instance.id in soon:
            members.setdefault(instance.busy_seq, []).append(instance.id)
    rows: dict[int, list[RequestView]] = {seq: [] for seq in members}
    for view in snapshot.running:
        if view.last_seq in rows and view.computed < view.prompt + view.max_tokens - 1:
            rows[view.last_seq].append(view)
    return {tuple(group): rows[seq] for seq, group in members.items() if rows[seq]}


def larger_degrees(topology: Topology, size: int, most: int) -> tuple[int, ...]:
    """Degrees above `size` and up to `most` that a group might grow to, the lowest few."""
    first = bisect_right(topology.degrees, size)
    last = bisect_right(topology.degrees, most)
    return topology.degrees[first : min(last, first + _MOST_DEGREES)]


def most_free(
    instances: Iterable[InstanceId], free: Mapping[InstanceId, int] | Sequence[int]
) -> list[InstanceId]:
    """Instances by free blocks, most first; among equals, the lowest."""
    return sorted(instances, key=lambda instance: (-free[instance], instance))
