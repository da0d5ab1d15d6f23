"""Scale-down in mid-decode: moves a request's KV together, so that its group gets smaller.

A request is spread over instances where memory was short, when its prompt came or later. It
is moved together when all of this holds:

- Nothing works on it, and the instances that give and take are idle in this plan.
- There is room: some of its homes can hold all that it may ever need, besides what others
  with KV there are granted in advance, and a smaller group covers those homes.
- It is cheap: fewer tokens move than it may still generate, or than prompt tokens are held
  up for lack of instances (those that moves in this plan answer for are not counted again).

Of its homes those with the most KV are kept, as few as have room; the others' KV goes to
where most is free, each share in one piece.

This cannot thrash. A request that was moved has room to its end: it only grows again when
others, token by token, took more there than they are granted. Between two growths its homes
only become fewer. And since a move is no step of `RequestView.last_seq`, whoever was owed a
token before it is owed it after.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count

from loongjax.plan import Group, InstanceId, MigrateStep, Move, RequestView, Share
from loongjax.scheduler.policies.board import Board, line_key
from loongjax.scheduler.policies.retention import new_blocks


@dataclass(kw_only=True, slots=True)
class _Batch:
    """Moves that are made together."""

    group: Group
    moves: list[Move] = field(default_factory=list)


class Consolidation:
    """The migrate steps of one plan, request by request."""

    def __init__(self, board: Board, held_up: int) -> None:
        """Comes after prompts, which use idle instances better, and before other decodes.

        Args:
          board: What the plan has left.
          held_up: Prompt tokens that wait for instances.
        """
        self._board = board
        self._held_up = held_up
        self._batches: list[_Batch] = []

    def seat(self) -> None:
        """Moves whom it is cheap to move, in line; not who shares KV, which would be copied."""
        board = self._board
        gone = board.seated.union(board.preempted)
        spread = [v for v in board.snapshot.running if len(v.kv) > 1 and not v.shared]
        for view in sorted(spread, key=line_key):
            if view.id in gone:
                continue
            moves = self._moves(view)
            tokens = sum(move.tokens for move in moves)
            if moves and tokens < max(self._held_up, view.peak - view.computed):
                self._take(view, moves, tokens)

    def steps(self, first_seq: int) -> list[MigrateStep]:
        """The batches as steps, numbered from `first_seq` on."""
        return [
            MigrateStep(seq=seq, group=batch.group, moves=tuple(batch.moves))
            for seq, batch in zip(count(first_seq), self._batches, strict=False)
        ]

    def _moves(self, view: RequestView) -> list[Move]:
        """How its KV comes together on as few of its homes as can be; empty if on no fewer."""
        topology = self._board.snapshot.topology
        now = topology.smallest_cover(view.homes)
        shares = sorted(view.kv, key=lambda share: (-share.tokens, share.instance))
        for kept in range(1, len(shares)):
            homes = frozenset(share.instance for share in shares[:kept])
            then = topology.smallest_cover(homes)
            if now is None or then is None or len(then) >= len(now):
                return []
            moves = self._moves_to(view, homes, shares[kept:])
            if moves:
                return moves
        return []

    def _moves_to(
        self, view: RequestView, homes: frozenset[InstanceId], leaving: list[Share]
    ) -> list[Move]:
        """Brings these shares to `homes`; empty if there is not enough room."""
        board = self._board
        free = {home: board.free[home] for home in homes}
        moves = []
        for source, tokens in leaving:
            target = max(free, key=lambda home: (free[home], -home))
            free[target] -= self._blocks(view, source)
            if free[target] < 0:
                return []
            moves.append(Move(view.id, source, target, tokens))
        moved = sum(self._blocks(view, source) for source, _ in leaving)
        rest = new_blocks(board, view, view.peak - view.computed)
        return moves if board.spare_for(view, homes) >= moved + rest else []

    def _blocks(self, view: RequestView, instance: InstanceId) -> int:
        """Blocks that its KV takes on an instance: as many as it takes anywhere at most."""
        slots = dict(view.kv)[instance] + dict(view.holes).get(instance, 0)
        return self._board.blocks(slots)

    def _take(self, view: RequestView, moves: list[Move], tokens: int) -> None:
        """Adds moves to a batch on their instances, or to a new one, if those are idle; waits
        for them if something works there.
        """
        board = self._board
        touched = {instance for move in moves for instance in (move.source, move.target)}
        if view.id in board.snapshot.in_flight:
            board.wanted |= touched
            return
        batch = next((b for b in self._batches if touched.issubset(b.group)), None)
        if batch is None:
            group = board.cover(frozenset(touched), frozenset(board.idle))
            if group is None:
                board.wanted |= touched
                return
            batch = _Batch(group=group)
            self._batches.append(batch)
            board.claim(group)
        batch.moves += moves
        self._held_up -= tokens
        gone = {move.source for move in moves}
        kv = tuple(share for share in view.kv if share.instance not in gone)
        blocks = Counter[InstanceId]()
        for move in moves:
            blocks[move.target] += self._blocks(view, move.source)
        board.hold_kv(replace(view, kv=kv), blocks)
