"""Decoding: which requests go together, on which group, and where their tokens are kept.

Requests that share an instance become one batch as long as a group holds all their KV; else
they take turns. A batch grows by the instances that its tokens or rows need, never for its
own sake. The home of a token stays where the request's last block has room.

Promises that nobody starves as long as steps end:
- Who was served longest ago is seated first, and whoever waits for decodes alone keeps the
  idle part of its group free, so that the group becomes idle as a whole.
- Who has no room for its next token is seated before prompts and all others, in line. The
  first in line may preempt those behind it, the last one first, so that it always gets on.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from itertools import count

from loongjax.plan import DecodeRow, DecodeStep, Group, InstanceId, RequestId, RequestView
from loongjax.scheduler.policies.board import Board, line_key
from loongjax.scheduler.policies.seats import Seat, cover_together, most_free, seat_beside


@dataclass(kw_only=True, slots=True, eq=False)
class _Batch:
    """Requests that decode together.

    Attributes:
      group: Where.
      needed: The part of it with KV of theirs, old or new; the rest only fills it up.
      rows: The requests, each with the home of its next token.
    """

    group: Group
    needed: set[InstanceId]
    rows: list[tuple[RequestView, InstanceId]]


class Decodes:
    """The decode steps of one plan, request by request."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._at: dict[InstanceId, _Batch] = {}
        self._done: set[RequestId] = set()

    # ---- who is seated, and when -----------------------------------------------------

    def seat_the_short(self) -> None:
        """Seats those whose instances have no room left; preempts where it must."""
        for view in tuple(self._board.running):
            if self._is_short(view) and view.id not in self._board.preempted:
                self._done.add(view.id)
                self._seat_short(view)

    def seat_the_rest(self) -> None:
        """Seats everybody else who can run now, those served longest ago first."""
        board = self._board
        done = self._done | board.seated
        rest = [view for view in board.running if view.id not in done]
        for view in sorted(rest, key=_turn_key):
            usable = board.idle | board.drained if board.put_off_on(view) else board.idle
            seat = self._find(view, usable, board.roomy)
            if seat is not None:
                self._take(view, seat)
            else:
                self._wait_for(view, self._find(view, usable | board.soon, board.roomy))

    def steps(self, first_seq: int) -> list[DecodeStep]:
        """The batches as steps, numbered from `first_seq` on."""
        batches = dict.fromkeys(self._at.values())  # each once, in order
        return [
            DecodeStep(seq=seq, group=batch.group, rows=_rows(batch))
            for seq, batch in zip(count(first_seq), batches, strict=False)
        ]

    def _is_short(self, view: RequestView) -> bool:
        return view.tail is None and not any(self._board.free[share.instance] for share in view.kv)

    def _seat_short(self, view: RequestView) -> None:
        """Now, else after the steps that it waits for, else at the cost of someone younger."""
        board, everywhere = self._board, set(self._board.free)
        roomy = board.roomy
        seat = self._find(view, board.idle, roomy)
        if seat is not None:
            self._take(view, seat)
            return
        if self._find(view, everywhere, roomy) is None:
            younger = board.behind(view)
            if self._preempt_for(view, younger):
                return
            roomy = {home for victim in younger for home in board.freed_by(victim)}
            if self._find(view, everywhere, roomy) is None:
                board.stuck.add(view.id)
        self._wait_for(view, self._find(view, board.idle | board.soon, roomy))

    def _preempt_for(self, view: RequestView, younger: list[RequestView]) -> bool:
        """Drops the KV of the youngest whose room helps; says whether it has dropped any.

        If nobody has room of his own there, one who shares all of it goes. What he shared is
        one holder nearer to being free when the next plan is made, which is at once.
        """
        board = self._board
        ready = [v for v in reversed(younger) if v.id not in board.snapshot.in_flight]
        for victim in ready:
            seat = self._find(view, board.idle, frozenset(board.freed_by(victim)))
            if seat is not None:
                board.preempt(victim)
                self._take(view, seat)
                return True
        for victim in ready:
            if victim.shared and self._find(view, board.idle, victim.homes) is not None:
                board.preempt(victim)
                return True
        return False

    def _wait_for(self, view: RequestView, seat: Seat[_Batch] | None) -> None:
        """Keeps what is idle of a group for who waits for the rest of it."""
        self._board.wanted |= view.homes.union(seat.group if seat else ())
        if seat is not None and not seat.joined:
            self._board.claim(seat.group)

    # ---- where -----------------------------------------------------------------------

    def _find(
        self, view: RequestView, usable: Set[InstanceId], roomy: Set[InstanceId]
    ) -> Seat[_Batch] | None:
        """A seat on usable instances, its new block, if it needs one, on a roomy one: with its
        other KV, or else beside it.
        """
        homes = view.homes
        joined = tuple(dict.fromkeys(self._at[home] for home in homes if home in self._at))
        if not joined and not homes.issubset(usable):
            return None  # as the search would find, for most who wait for a step to end
        rows = sum(len(batch.rows) for batch in joined) + 1
        least = -(-rows // self._board.snapshot.max_rows)
        if len(joined) == 1 and len(joined[0].group) >= least and homes.issubset(joined[0].group):
            group: Group | None = joined[0].group
        else:
            group = cover_together(self._board, joined, homes, usable, least)
        if group is None:
            return None
        home = self._home_within(view, homes, group, roomy)
        if home is not None:
            return Seat(joined=joined, group=group, home=home)
        beside = most_free(roomy - set(group), self._board.free)
        return seat_beside(self._board, joined, homes, usable, beside, least)

    def _home_within(
        self,
        view: RequestView,
        homes: frozenset[InstanceId],
        group: Group,
        roomy: Set[InstanceId],
    ) -> InstanceId | None:
        """Where the next token is kept, if the group has room: with its KV, if it can be."""
        if view.tail is not None:
            return view.tail.instance
        own = most_free(roomy & homes, self._board.free)
        if own:
            return own[0]
        others = most_free(roomy & set(group), self._board.free)
        return others[0] if others else None

    def _take(self, view: RequestView, seat: Seat[_Batch]) -> None:
        batch = _Batch(group=seat.group, needed=set(), rows=[])
        if len(seat.joined) == 1 and seat.joined[0].group == seat.group:
            batch = seat.joined[0]
        else:
            for other in seat.joined:
                batch.needed |= other.needed
                batch.rows += other.rows
                for instance in other.group:
                    del self._at[instance]
            self._at |= dict.fromkeys(seat.group, batch)
            self._board.claim(seat.group)
        batch.needed |= {seat.home, *(share.instance for share in view.kv)}
        batch.rows.append((view, seat.home))
        self._board.seated.add(view.id)
        if view.tail is None:
            self._board.take(seat.home, 1)


def _turn_key(view: RequestView) -> tuple[int, int, tuple[int, float, RequestId]]:
    """Whose turn it is: served longest ago, then fewest tokens, then first in line."""
    last_seq = -1 if view.last_seq is None else view.last_seq
    return (last_seq, view.generated, line_key(view))


def _rows(batch: _Batch) -> tuple[DecodeRow, ...]:
    """Gives each request a master: where most of its KV lies, if that rank has a row left.

    Every rank gets at most its part of the rows, rounded up.
    """
    most = -(-len(batch.rows) // len(batch.group))
    filled = dict.fromkeys(batch.group, 0)
    rows = []
    for view, home in batch.rows:
        tokens = dict(view.kv)
        master = max(
            (instance for instance in batch.group if filled[instance] < most),
            key=lambda instance: (tokens.get(instance, 0), -filled[instance], -instance),
        )
        filled[master] += 1
        rows.append(DecodeRow(view.id, master, home))
    return tuple(rows)
