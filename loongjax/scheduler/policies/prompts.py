"""Prompts: who is admitted, at which degree, in which chunks, and together with whom.

Strictly in line: while the first prompt waits, no later one overtakes it. It waits for
memory (decodes go on meanwhile, and end), or for instances that are busy: those that are
idle already are kept for it, so that its group becomes idle as a whole.

A prompt that is longer than a step of its group takes is computed in chunks, each over its
own history. Whoever was begun goes before all who were not: what it holds is of use to nobody
before it is whole.

Promises: a prompt is admitted only where it could end if it were alone, and only if memory
remains for all of it and for what everybody nearby is granted in advance (`Board.grant`). So
admitting one rarely means preempting soon, and if others took what a begun prompt still needs,
those behind it in line give it back. Between two chunks on an instance, whosever they are,
everybody who decodes there gets a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from itertools import count

from loongjax.plan import Chunk, Group, InstanceId, Placement, PrefillStep, RequestView, Share
from loongjax.scheduler.policies.board import Board, line_key
from loongjax.scheduler.policies.retention import keep, new_blocks


@dataclass(kw_only=True, slots=True)
class _Batch:
    """Chunks that are computed together.

    Attributes:
      group: Where.
      load: Tokens for each rank, padding counted.
    """

    group: Group
    load: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    keep: list[Placement] = field(default_factory=list)

    def load_with(self, tokens: int) -> int:
        """Tokens for each rank if a chunk of so many joins."""
        return self.load + -(-tokens // len(self.group))


class Prompts:
    """The prefill steps of one plan, prompt by prompt."""

    def __init__(self, board: Board, tokens_per_rank: int) -> None:
        """Comes after those decodes that have no room, for they go first."""
        self._board = board
        self._full = min(tokens_per_rank, board.snapshot.max_chunk_tokens)
        self._batches: list[_Batch] = []
        decoding = (view for view in board.running if view.id not in board.stuck)
        self._owed = frozenset[InstanceId]().union(*map(board.put_off_on, decoding))
        self._waiting: list[RequestView] = []
        self._lacks_instances = False

    def seat(self) -> None:
        """Admits prompts in line until one has to wait; then those alone that were begun."""
        board, snapshot = self._board, self._board.snapshot
        self._waiting = sorted(
            (view for view in snapshot.waiting if view.id not in snapshot.in_flight),
            key=lambda view: (not view.kv, line_key(view)),
        )
        share = self._fair_share()
        line_moves = True
        for view in self._waiting:
            if (line_moves or view.kv) and view.id not in board.preempted:
                line_moves = self._seat_one(view, share) and line_moves

    @property
    def held_up(self) -> int:
        """Tokens of prompts that wait, if there is memory for one and instances are lacking."""
        seated = self._board.seated
        left = sum(view.uncomputed for view in self._waiting if view.id not in seated)
        return left if self._lacks_instances else 0

    def steps(self, first_seq: int) -> list[PrefillStep]:
        """The batches as steps, numbered from `first_seq` on."""
        return [
            PrefillStep(
                seq=seq, group=batch.group, chunks=tuple(batch.chunks), keep=tuple(batch.keep)
            )
            for seq, batch in zip(count(first_seq), self._batches, strict=False)
        ]

    def _fair_share(self) -> int:
        """Tokens for each rank, were the prompts spread evenly over all that is ready.

        Prompts share a group up to here, and never beyond `tokens_per_rank` on purpose. So
        short ones do not crowd on one instance while others idle, nor take an instance each
        while a long one needs many.
        """
        tokens = sum(view.uncomputed for view in self._waiting)
        return min(self._full, -(-tokens // max(1, len(self._ready()))))

    def _seat_one(self, view: RequestView, share: int) -> bool:
        """Joins a batch, opens one, or keeps what is idle of the group that it waits for."""
        if not self._has_memory(view):
            return False
        if self._join(view, share):
            return True
        ready = self._ready()
        group = self._choose(view, ready, ready | self._soon())
        if group is not None and ready.issuperset(group):
            batch = _Batch(group=group)
            self._batches.append(batch)
            self._board.claim(group)
            self._add(batch, view, self._chunk(view, group))
            return True
        if self._join(view, self._full):
            return True
        if group is None:
            group = self._choose(view, set(self._board.free))
        if group is not None:
            self._lacks_instances = True
            self._board.wanted.update(group)
            self._board.drain(ready.intersection(group))
        return False

    # ---- batches ---------------------------------------------------------------------

    def _chunk(self, view: RequestView, group: Group) -> int:
        """Tokens of a prompt that one step of a group takes."""
        return min(view.uncomputed, self._board.snapshot.max_chunk_tokens * len(group))

    def _join(self, view: RequestView, limit: int) -> bool:
        """Adds the rest of a prompt to the emptiest batch that can take it."""
        rows, tokens = self._board.snapshot.max_rows, view.uncomputed
        for batch in sorted(self._batches, key=lambda batch: batch.load_with(tokens)):
            if batch.load_with(tokens) > limit:
                return False
            has_row = len(batch.chunks) < rows * len(batch.group)
            if has_row and view.homes.issubset(batch.group) and self._fits(view, batch.group):
                self._add(batch, view, tokens)
                return True
        return False

    def _add(self, batch: _Batch, view: RequestView, tokens: int) -> None:
        shares, blocks = keep(self._board, view, batch.group, tokens)
        end = view.computed + tokens
        batch.load = batch.load_with(tokens)
        batch.chunks.append(
            Chunk(request=view.id, start=view.computed, length=tokens, last=end == view.length)
        )
        batch.keep.append(Placement(request=view.id, shares=shares))
        held = Counter(dict(view.kv)) + Counter(dict(shares))
        kv = tuple(Share(instance, held[instance]) for instance in sorted(held))
        self._board.hold_kv(replace(view, computed=end, kv=kv, tail=None), blocks)

    # ---- groups ----------------------------------------------------------------------

    def _ready(self) -> set[InstanceId]:
        """Idle, and no decode goes before the next prompt there."""
        return self._board.idle - self._owed

    def _soon(self) -> set[InstanceId]:
        """Ready, or to be after a step that computes no prompt, and not kept for another one."""
        own = {instance for batch in self._batches for instance in batch.group}
        return self._board.free.keys() - self._board.late - self._board.drained - own

    def _choose(self, view: RequestView, *levels: Set[InstanceId]) -> Group | None:
        """A group for a prompt at the best degree for which there is one.

        Waiting for a decode step is better than a lesser degree, so each degree is tried at
        every level of `levels`, sets of instances to choose from, before the next one is.
        """
        for degree in self._degrees(view):
            for usable in levels:
                for group in self._candidates(degree, usable, view.homes):
                    if self._fits(view, group):
                        return group
        return None

    def _degrees(self, view: RequestView) -> list[int]:
        """The smallest degree that keeps a rank under `tokens_per_rank`; then larger ones,
        which have more memory; then smaller ones, with more chunks where it takes them.
        """
        degrees = self._board.snapshot.topology.degrees
        wanted = next((d for d in degrees if -(-view.uncomputed // d) <= self._full), degrees[-1])
        return [d for d in degrees if d >= wanted] + [d for d in degrees[::-1] if d < wanted]

    def _candidates(
        self, degree: int, usable: Set[InstanceId], homes: frozenset[InstanceId]
    ) -> Iterator[Group]:
        """Groups with these homes, those with most ready instances and most free memory first."""
        if not len(homes) <= degree <= len(usable) or not homes <= usable:
            return
        free, ready, topology = self._board.free, self._ready(), self._board.snapshot.topology
        by_room = sorted(usable, key=lambda i: (i not in homes, -free[i], i))
        by_ready = sorted(by_room, key=lambda i: (i not in homes, i not in ready))
        for best in (by_ready, by_room):
            group = tuple(sorted(best[:degree]))
            if topology.contains(group):
                yield group
        fixed = frozenset(usable)
        covers = {topology.smallest_cover(homes | {i}, fixed, degree) for i in by_room}
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

    def _has_memory(self, view: RequestView) -> bool:
        """Whether any group may fit: cheap for a new prompt; a begun one sees to it."""
        board = self._board
        if not view.kv:
            return sum(board.free.values()) >= board.grant(view)
        return self._choose(view, set(board.free)) is not None or self._take_back(view)

    def _fits(self, view: RequestView, group: Group) -> bool:
        """Whether a group has room for a prompt's next chunk; for a new one, for all of it."""
        board, members = self._board, frozenset(group)
        free = sum(board.free[instance] for instance in group)
        if free < new_blocks(board, view, self._chunk(view, group)):
            return False
        if not board.can_hold_peak(members, view):
            return False
        return bool(view.kv) or board.spare_around(members) >= board.grant(view)

    def _take_back(self, view: RequestView) -> bool:
        """Makes room for the next chunk of a begun prompt; says whether there is room now.

        Those behind it in line give up their KV, the last one first, when all instances
        around it are ready. If even that were not enough, it waits for those before it.
        """
        board = self._board
        region = board.reach(view.homes)
        chunk = self._chunk(view, tuple(region))
        lacking = new_blocks(board, view, chunk) - sum(board.free[i] for i in region)
        behind = board.behind(view)
        if lacking > sum(board.blocks_on(region, other) for other in behind):
            return False
        ready = self._ready()
        if not ready.issuperset(region):
            board.wanted |= region
            board.drain(ready & region)
            return False
        for victim in reversed(behind):
            if lacking > 0 and victim.id not in board.snapshot.in_flight:
                # What it shares is free when the last one that shares it is gone.
                freed = board.freed_by(victim)
                lacking -= sum(blocks for home, blocks in freed.items() if home in region)
                board.preempt(victim)
        return lacking <= 0
