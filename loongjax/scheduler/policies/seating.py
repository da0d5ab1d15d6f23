"""Decoding in `LoongServe`: who goes together, on which group, and where tokens are kept.

Requests that share an instance become one batch as long as a group holds all their KV; else
they take turns. The home of a token stays where the request's last block has room. A group
grows by the instances that its tokens need (scale-up by memory), and in the end by those that
make its step quicker (`scaling.scale_up`).

Promises that nobody starves as long as steps end:
- Who was served longest ago is seated first, and whoever waits for decodes alone keeps the
  idle part of its group free, so that the group becomes idle as a whole.
- Who has no room for its next token is seated before prompts and all others, in line. The
  first in line may preempt those behind it, the last one first, so that it always gets on.

Near linear: a request that joins a batch with all its homes costs O(homes); a group is looked
for once for all requests with the same homes.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import count

from loongjax.costmodel.protocol import CostModel
from loongjax.plan import DecodeStep, Group, InstanceId, RequestId, RequestView
from loongjax.scheduler.policies.seats import (
    Seat,
    cover_together,
    larger_degrees,
    most_free,
    seat_beside,
)
from loongjax.scheduler.policies.worktable import Worktable, line_key
from loongjax.scheduler.scaling import choose_masters, masters_needed, scale_up


@dataclass(kw_only=True, slots=True, eq=False)
class _Batch:
    """Requests that decode together.

    Attributes:
      group: Where; the same as a set in `members`.
      needed: The part of it with KV of theirs, old or new; the rest only fills it up.
      rows: The requests, each with the home of its next token.
      most: How many rows the group takes.
    """

    group: Group
    members: frozenset[InstanceId]
    needed: set[InstanceId]
    rows: list[tuple[RequestView, InstanceId]]
    most: int


class Seating:
    """The decode steps of one plan, request by request."""

    def __init__(self, table: Worktable, *, grows: bool) -> None:
        """`grows`: whether groups may take instances that their requests could end without."""
        self._table = table
        self._grows = grows
        self._at: dict[InstanceId, _Batch] = {}
        self._done: set[RequestId] = set()

    # ---- who is seated, and when -----------------------------------------------------

    def seat_the_short(self) -> None:
        """Seats those whose instances have no room left; preempts where it must."""
        table = self._table
        full = {instance for instance, blocks in enumerate(table.free) if not blocks}
        if not full:
            return
        in_flight = table.snapshot.in_flight
        short = [
            view
            for view in table.snapshot.running
            if view.kv[0][0] in full
            and view.tail is None
            and view.id not in in_flight
            and full.issuperset(view.homes)
        ]
        for view in sorted(short, key=line_key):
            if view.id not in table.preempted:
                self._done.add(view.id)
                self._seat_short(view)

    def seat_the_rest(self) -> None:
        """Seats everybody else who can run now, those served longest ago first."""
        table, done = self._table, self._done
        rest = [view for view in table.near if view.id not in done] if done else table.near
        refused: set[tuple[frozenset[InstanceId], bool, bool]] = set()
        for view in sorted(rest, key=_turn):
            if self._join(view):
                continue
            put_off = bool(table.put_off_on(view))
            case = (view.homes, view.tail is None, put_off)
            if case in refused:
                continue
            usable = table.idle | table.held if put_off else table.idle
            seat = self._find(view, usable)
            if seat is not None:
                self._take(view, seat)
            else:
                refused.add(case)
                self._keep_free(self._find(view, usable | table.soon))

    def grow_for_compute(self, cost: CostModel) -> None:
        """Gives idle instances to batches whose steps are quicker with them."""
        table = self._table
        topology = table.snapshot.topology
        for batch in self._batches():
            if not table.idle or not self._grows:
                return
            empty = frozenset(filter(table.is_empty, table.idle))
            size = len(batch.group)
            degrees = larger_degrees(topology, size, size + len(empty))
            degree = scale_up(len(batch.rows), _kv_tokens(batch), size, degrees, cost)
            if degree == size:
                continue
            group = topology.smallest_cover(batch.members, batch.members | empty, degree)
            if group is not None and len(group) == degree:
                batch.group, batch.members = group, frozenset(group)
                table.claim(group)

    def steps(self, first_seq: int, cost: CostModel) -> list[DecodeStep]:
        """The batches as steps, numbered from `first_seq` on."""
        most = self._table.snapshot.max_rows
        found = []
        for seq, batch in zip(count(first_seq), self._batches(), strict=False):
            rows, degree = len(batch.rows), len(batch.group)
            masters = masters_needed(rows, _kv_tokens(batch), degree, -(-rows // most), cost)
            found.append(
                DecodeStep(
                    seq=seq,
                    group=batch.group,
                    rows=choose_masters(batch.rows, batch.group, masters),
                )
            )
        return found

    def _batches(self) -> Iterator[_Batch]:
        return iter(dict.fromkeys(self._at.values()))  # each once, in order

    # ---- those without room ----------------------------------------------------------

    def _seat_short(self, view: RequestView) -> None:
        """Now, else after the steps that it waits for, else at the cost of someone younger."""
        table, everywhere = self._table, self._table.everything
        seat = self._find(view, table.idle)
        if seat is not None:
            self._take(view, seat)
            return
        roomy: Set[InstanceId] | None = None
        if self._find(view, everywhere) is None:
            younger = self._younger(view)
            if self._preempt_for(view, younger):
                return
            roomy = {home for victim in younger for home in victim.homes}
            if self._find(view, everywhere, roomy) is None:
                table.stuck.add(view.id)
        self._keep_free(self._find(view, table.idle | table.soon, roomy))

    def _younger(self, view: RequestView) -> list[RequestView]:
        """Those behind it in line that could give up KV for it, in line."""
        table = self._table
        return [
            other
            for other in sorted(table.census, key=line_key)
            if line_key(other) > line_key(view)
        ]

    def _preempt_for(self, view: RequestView, younger: list[RequestView]) -> bool:
        table = self._table
        for victim in reversed(younger):
            if victim.id in table.snapshot.in_flight:
                continue
            seat = self._find(view, table.idle, victim.homes)
            if seat is not None:
                table.preempt(victim)
                self._take(view, seat)
                return True
        return False

    def _keep_free(self, seat: Seat[_Batch] | None) -> None:
        """Keeps what is idle of a group for who waits for the rest of it."""
        if seat is not None and not seat.joined:
            self._table.claim(seat.group)

    # ---- where -----------------------------------------------------------------------

    def _join(self, view: RequestView) -> bool:
        """Joins the batch that is where all its KV lies, if that has room: the usual case."""
        batch = self._at.get(view.kv[0][0])
        if batch is None or len(batch.rows) >= batch.most:
            return False
        free, members, home = self._table.free, batch.members, -1
        for share in view.kv:
            instance = share[0]
            if instance not in members:
                return False
            if free[instance] and (home < 0 or free[instance] > free[home]):
                home = instance
        if view.tail is not None:
            home = view.tail.instance
        elif home < 0:
            return False
        else:
            free[home] -= 1
        batch.needed.update([share[0] for share in view.kv])
        batch.rows.append((view, home))
        return True

    def _find(
        self, view: RequestView, usable: Set[InstanceId], roomy: Set[InstanceId] | None = None
    ) -> Seat[_Batch] | None:
        """A seat on usable instances, its new block, if it needs one, on one that has any, or
        that is in `roomy`.
        """
        homes = view.homes
        at = self._at
        if any(home not in usable and home not in at for home in homes):
            return None
        joined = tuple(dict.fromkeys(at[home] for home in homes if home in at))
        rows = sum(len(batch.rows) for batch in joined) + 1
        least = -(-rows // self._table.snapshot.max_rows)
        if len(joined) == 1 and len(joined[0].group) >= least and homes <= joined[0].members:
            group: Group | None = joined[0].group
        else:
            group = cover_together(self._table, joined, homes, usable, least)
        if group is None:
            return None
        if view.tail is not None:
            return Seat(joined=joined, group=group, home=view.tail.instance)
        free = self._table.free
        if roomy is None:
            roomy = {i for i, blocks in enumerate(free) if blocks}
        within = most_free(roomy & homes, free) or most_free(roomy & set(group), free)
        if within:
            return Seat(joined=joined, group=group, home=within[0])
        if not self._may_grow(view, group):
            return None
        beside = most_free(roomy & (usable | at.keys()) - set(group), free)
        return seat_beside(self._table, joined, homes, usable, beside, least)

    def _may_grow(self, view: RequestView, group: Group) -> bool:
        table = self._table
        own = sum(table.capacity[instance] for instance in group)
        return self._grows or own < table.blocks(view.peak)

    def _take(self, view: RequestView, seat: Seat[_Batch]) -> None:
        if len(seat.joined) == 1 and seat.joined[0].group == seat.group:
            batch = seat.joined[0]
        else:
            batch = self._open(seat)
        batch.needed |= {seat.home, *view.homes}
        batch.rows.append((view, seat.home))
        if view.tail is None:
            self._table.free[seat.home] -= 1

    def _open(self, seat: Seat[_Batch]) -> _Batch:
        most = len(seat.group) * self._table.snapshot.max_rows
        members = frozenset(seat.group)
        batch = _Batch(group=seat.group, members=members, needed=set(), rows=[], most=most)
        for other in seat.joined:
            batch.needed |= other.needed
            batch.rows += other.rows
            for instance in other.group:
                del self._at[instance]
        self._at |= dict.fromkeys(seat.group, batch)
        self._table.claim(seat.group)
        return batch


def _turn(view: RequestView) -> int:
    """Whose turn it is: served longest ago; among equals, who came first."""
    return -1 if view.last_seq is None else view.last_seq


def _kv_tokens(batch: _Batch) -> int:
    return sum(view.computed for view, _ in batch.rows)
