"""Prompts: who is admitted, at which degree, and together with whom.

Strictly in line: while the first prompt waits, no later one overtakes it. It waits for
memory (decodes go on meanwhile, and end), or for instances that are busy: those that are
idle already are kept for it, so that its group becomes idle as a whole.

Promises: a prompt is admitted only where it could end if it were alone, and only if memory
remains for what everybody nearby is granted in advance (`Board.growth`), so that admitting
one rarely means preempting it soon. Between two prompts on an instance, everybody who
decodes there gets a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from itertools import count

from loongjax.plan import Chunk, Group, InstanceId, Placement, PrefillStep, RequestView
from loongjax.scheduler.policies.board import Board, line_key
from loongjax.scheduler.policies.retention import keep


@dataclass(kw_only=True, slots=True)
class _Batch:
    """Prompts that are computed together.

    Attributes:
      group: Where.
      load: Tokens for each rank, padding counted.
    """

    group: Group
    load: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    keep: list[Placement] = field(default_factory=list)

    def load_with(self, view: RequestView) -> int:
        """Tokens for each rank if this prompt joins."""
        return self.load + -(-view.length // len(self.group))


class Prompts:
    """The prefill steps of one plan, prompt by prompt."""

    def __init__(self, board: Board, tokens_per_rank: int) -> None:
        """Comes after those decodes that have no room, for they go first."""
        self._board = board
        self._full = min(tokens_per_rank, board.snapshot.max_chunk_tokens)
        self._batches: list[_Batch] = []
        decoding = (view for view in board.running if view.id not in board.stuck)
        self._owed = frozenset[InstanceId]().union(*map(board.put_off_on, decoding))

    def seat(self) -> None:
        """Admits prompts in line until one has to wait."""
        snapshot = self._board.snapshot
        waiting = sorted(
            (view for view in snapshot.waiting if view.id not in snapshot.in_flight), key=line_key
        )
        share = self._fair_share(waiting)
        for view in waiting:
            if not self._seat_one(view, share):
                return

    def steps(self, first_seq: int) -> list[PrefillStep]:
        """The batches as steps, numbered from `first_seq` on."""
        return [
            PrefillStep(
                seq=seq, group=batch.group, chunks=tuple(batch.chunks), keep=tuple(batch.keep)
            )
            for seq, batch in zip(count(first_seq), self._batches, strict=False)
        ]

    def _fair_share(self, waiting: list[RequestView]) -> int:
        """Tokens for each rank, were the prompts spread evenly over all that is ready.

        Prompts share a group up to here, and never beyond `tokens_per_rank` on purpose. So
        short ones do not crowd on one instance while others idle, nor take an instance each
        while a long one needs many.
        """
        tokens = sum(view.length for view in waiting)
        return min(self._full, -(-tokens // max(1, len(self._ready()))))

    def _seat_one(self, view: RequestView, share: int) -> bool:
        """Joins a batch, opens one, or keeps what is idle of the group that it waits for."""
        if not self._pool_has_room(view):
            return False
        if self._join(view, share):
            return True
        ready = self._ready()
        group = self._choose(view, ready, ready | self._soon())
        if group is not None and ready.issuperset(group):
            batch = _Batch(group=group)
            self._batches.append(batch)
            self._board.claim(group)
            self._add(batch, view)
            return True
        if self._join(view, self._full):
            return True
        if group is None:
            group = self._choose(view, set(self._board.free))
        if group is not None:
            self._board.drain(ready.intersection(group))
        return False

    # ---- batches ---------------------------------------------------------------------

    def _join(self, view: RequestView, limit: int) -> bool:
        """Adds a prompt to the emptiest batch that can take it."""
        rows = self._board.snapshot.max_rows
        for batch in sorted(self._batches, key=lambda batch: batch.load_with(view)):
            if batch.load_with(view) > limit:
                return False
            if len(batch.chunks) < rows * len(batch.group) and self._fits(view, batch.group):
                self._add(batch, view)
                return True
        return False

    def _add(self, batch: _Batch, view: RequestView) -> None:
        shares = keep(self._board, view, batch.group)
        batch.load = batch.load_with(view)
        batch.chunks.append(Chunk(request=view.id, start=0, length=view.length, last=True))
        batch.keep.append(Placement(request=view.id, shares=shares))
        self._board.hold_kv(replace(view, computed=view.length, kv=shares))

    # ---- groups ----------------------------------------------------------------------

    def _ready(self) -> set[InstanceId]:
        """Idle, and no decode goes before the next prompt there."""
        return self._board.idle - self._owed

    def _soon(self) -> set[InstanceId]:
        """Ready, or to be after a decode step."""
        own = {instance for batch in self._batches for instance in batch.group}
        return self._board.free.keys() - self._board.late - own

    def _choose(self, view: RequestView, *levels: Set[InstanceId]) -> Group | None:
        """A group for a prompt at the best degree for which there is one.

        Waiting for a decode step is better than a lesser degree, so each degree is tried at
        every level of `levels`, sets of instances to choose from, before the next one is.
        """
        for degree in self._degrees(view):
            for usable in levels:
                for group in self._candidates(degree, usable):
                    if self._fits(view, group):
                        return group
        return None

    def _degrees(self, view: RequestView) -> list[int]:
        """The smallest degree that keeps a rank under `tokens_per_rank`; then larger ones,
        which have more memory; then smaller ones, that a step can still hold.
        """
        degrees = self._board.snapshot.topology.degrees
        limit = self._board.snapshot.max_chunk_tokens
        roomy = [degree for degree in degrees if -(-view.length // degree) <= limit]
        wanted = next((d for d in roomy if -(-view.length // d) <= self._full), degrees[-1])
        return [d for d in roomy if d >= wanted] + [d for d in roomy[::-1] if d < wanted]

    def _candidates(self, degree: int, usable: Set[InstanceId]) -> Iterator[Group]:
        """Groups to try, those with most ready instances and most free memory first."""
        if len(usable) < degree:
            return
        free, ready, topology = self._board.free, self._ready(), self._board.snapshot.topology
        by_room = sorted(usable, key=lambda i: (-free[i], i))
        by_ready = sorted(by_room, key=lambda i: i not in ready)
        for best in (by_ready, by_room):
            group = tuple(sorted(best[:degree]))
            if topology.contains(group):
                yield group
        fixed = frozenset(usable)
        covers = {topology.smallest_cover(frozenset({i}), fixed, degree) for i in by_room}
        groups = [group for group in covers if group is not None and len(group) == degree]
        yield from sorted(
            groups,
            key=lambda group: (
                sum(i not in ready for i in group),
                -sum(free[i] for i in group),
                group,
            ),
        )

    # ---- memory ----------------------------------------------------------------------

    def _pool_has_room(self, view: RequestView) -> bool:
        """Cheap, and necessary for any group to fit."""
        board = self._board
        return sum(board.free.values()) >= board.blocks(view.length) + board.growth(view)

    def _fits(self, view: RequestView, group: Group) -> bool:
        board, members = self._board, frozenset(group)
        blocks = board.blocks(view.length)
        if sum(board.free[instance] for instance in group) < blocks:
            return False
        if not board.can_hold_peak(members, view):
            return False
        return board.spare_around(members) >= blocks + board.growth(view)
