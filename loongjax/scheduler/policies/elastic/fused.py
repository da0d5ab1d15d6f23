"""A step that is being made: parts of prompts, and everyone who decodes on its instances.

It may last as long as those who decode there can wait for their next tokens. They ride along, as
chunks of one token (SplitFuse; Sarathi-Serve, OSDI '24), where that takes less time than a step of
their own after it; else they wait for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.plan import (
    Chunk,
    Group,
    InstanceId,
    Placement,
    PrefillStep,
    RequestView,
    Share,
)
from loongjax.scheduler.policies.retention import in_order
from loongjax.scheduler.policies.worktable import Worktable

_OVERHEAD = 0.2
"""A part of a prompt is worth it if so much of its time goes at most into what does not grow with
it: the constant part of a step, and reading history. What takes twice the time tells."""
_LONGER = 1.5
"""By how much longer parts are tried, one after the other, until one is worth it."""
_LEFTOVER = 0.05
"""Part of a step's time that is not filled up with less than that."""


class FusedStep:
    """See the module.

    Attributes:
      group: Where.
      members: The same as a set.
      budget: How long it may last at most, for others wait for its end [s].
      chunk_s: How long it may last, unless the least part of a prompt that is worth it takes
        longer [s].
      meets: Whether somebody waits for its end, so that it lasts no longer in any case.
    """

    def __init__(
        self,
        table: Worktable,
        cost: CostModel,
        group: Group,
        riders: Sequence[RequestView],
        budget: float,
        chunk_s: float,
        *,
        meets: bool = False,
    ) -> None:
        """Takes blocks for the next tokens of all `riders`, whose KV lies on the group.

        Who finds none does not ride along.
        """
        self.group = group
        self.members = frozenset(group)
        self.budget = budget
        self.chunk_s = chunk_s
        self.meets = meets
        self._table = table
        self._cost = cost
        self._riders = [
            (view, home) for view in riders if (home := self._home(view, table)) is not None
        ]
        self._carried = self._as_chunks()
        self._chunks: list[tuple[RequestView, int, tuple[Share, ...]]] = []
        self._works: list[ChunkWork] = []
        self._refused = math.inf
        self.decode_s = self._decode_s()
        self._known_s: float | None = None

    # ---- who decodes -----------------------------------------------------------------

    def _home(self, view: RequestView, table: Worktable) -> InstanceId | None:
        """Where a rider's next token is kept; takes the block."""
        if view.tail is not None:
            return view.tail.instance
        free, homes = table.free, view.homes
        home = max(self.group, key=lambda i: (free[i] > 0, i in homes, free[i], -i))
        if not free[home]:
            return None
        free[home] -= 1
        return home

    def _decode_s(self) -> float:
        """What a step of those who decode alone takes [s]."""
        if not self._riders:
            return 0.0
        degree, rows = len(self.group), len(self._riders)
        held = dict.fromkeys(self.group, 0)
        for view, _ in self._riders:
            for instance, tokens in view.kv:
                held[instance] += tokens
        longest = max(view.computed for view, _ in self._riders)
        kv = max(held.values()) * degree
        return self._cost.decode(degree, DecodeWork(rows, kv, min(degree, rows), longest))

    def _as_chunks(self) -> list[ChunkWork]:
        """Riders as chunks that take as long in a step of prompts: few, for there may be hundreds
        of them, and steps are measured again and again while they are made.
        """
        if not self._riders:
            return []
        history = sum([self._work(view, 1).history for view, _ in self._riders])
        first, others = ChunkWork(1, history), ChunkWork(len(self._riders) - 1, 0)
        return [first, others] if others.tokens else [first]

    # ---- time ------------------------------------------------------------------------

    def _work(self, view: RequestView, tokens: int) -> ChunkWork:
        """Its fullest instance decides how long history takes."""
        fullest = max([share[1] for share in view.kv], default=0)
        return ChunkWork(tokens, max(view.computed, fullest * len(self.group)))

    def _carries(self, works: Sequence[ChunkWork]) -> bool:
        """Whether riders go along with these, rather than after them."""
        if not self._riders:
            return False
        degree, cost = len(self.group), self._cost
        return cost.prefill(degree, [*self._carried, *works]) < self._apart(works)

    def _apart(self, works: Sequence[ChunkWork]) -> float:
        return self._cost.prefill(len(self.group), works) + self.decode_s

    def _seconds(self, *more: ChunkWork) -> float:
        """With these besides, and until riders have their tokens."""
        works = [*self._works, *more]
        if not works:
            return self.decode_s
        if not self._riders:
            return self._cost.prefill(len(self.group), works)
        together = self._cost.prefill(len(self.group), [*self._carried, *works])
        return min(together, self._apart(works))

    @property
    def left_s(self) -> float:
        """What is left of its time [s]."""
        return min(self.budget, self.chunk_s) - self._so_far_s

    @property
    def _so_far_s(self) -> float:
        """How long it takes as it is [s]; it is asked for again and again between two prompts."""
        if self._known_s is None:
            self._known_s = self._seconds()
        return self._known_s

    # ---- prompts ---------------------------------------------------------------------

    @property
    def may_be_forced(self) -> bool:
        """Whether a prompt may get on though there is no time for it."""
        return not self._works and not self.meets

    def refuses(self, view: RequestView) -> bool:
        """Whether it is known that there is no time for a new prompt, or no room."""
        if self.may_be_forced or view.kv:
            return False
        most = self._most(view)
        return most < 1 or most >= self._refused

    def add(self, view: RequestView, homes: Collection[InstanceId], *, forced: bool = False) -> int:
        """Adds the next tokens of a prompt, as many as there is time and memory for.

        Args:
          view: The prompt.
          homes: Instances of the group that are to keep its KV.
          forced: Whether it gets on though there is no time for it, by as little as is worth it,
            if it is the first one.

        Returns:
          How many tokens, maybe none.
        """
        forced = self.may_be_forced and (forced or not self._riders)
        tokens = self._fit(view, forced)
        table, size = self._table, self._table.snapshot.block_size
        tail = 0 if view.tail is None else view.tail.tokens
        if tail + size * sum([table.free[i] for i in homes]) < tokens:
            homes = self.group
            tokens = min(tokens, tail + size * sum([table.free[i] for i in homes]))
        if tokens < 1:
            return 0
        taken = spread(view, homes, table.free, -(-max(0, tokens - tail) // size), size)
        free = dict(enumerate(table.free))
        shares = in_order(view, taken, free, tokens, size)
        self._chunks.append((view, tokens, shares))
        self._works.append(self._work(view, tokens))
        self._refused = math.inf
        self._known_s = None
        kv = dict(view.kv)
        for instance, kept in shares:
            kv[instance] = kv.get(instance, 0) + kept
        after = tuple(Share(instance, kv[instance]) for instance in sorted(kv))
        placed = replace(view, computed=view.computed + tokens, kv=after)
        table.place(placed, taken.items(), new=not view.kv)
        return tokens

    def _fit(self, view: RequestView, forced: bool) -> int:
        """How many of a prompt's tokens there is time for, if any are worth it."""
        most = self._most(view)
        refused = not forced and not view.kv and most >= self._refused
        if most < 1 or refused:
            return 0

        history = self._work(view, most).history

        def seconds(tokens: int) -> float:
            return self._seconds(ChunkWork(tokens, history))

        limit, before_s = min(self.budget, self.chunk_s), self._so_far_s
        if seconds(most) <= limit:
            return most

        def is_worth_it(tokens: int) -> bool:
            own_s = seconds(tokens) - before_s
            if own_s < _LEFTOVER * limit:
                return False
            twice = _largest(seconds, before_s + 2 * own_s, most)
            as_fast = (2 - 2 * _OVERHEAD) / (2 - _OVERHEAD)
            return tokens / own_s >= as_fast * twice / (seconds(twice) - before_s)

        part_s = seconds(1)
        if part_s <= limit and is_worth_it(tokens := _largest(seconds, limit, most)):
            return tokens
        longest = math.inf if forced else self.budget
        while not self._works and part_s <= longest:
            tokens = _largest(seconds, part_s, most)
            if tokens == most or is_worth_it(tokens):
                return tokens
            part_s *= _LONGER
        if not view.kv:
            self._refused = min(self._refused, most)
        return 0

    def _most(self, view: RequestView) -> int:
        """How many of a prompt's tokens are left and have room."""
        return min(max(1, view.uncomputed), self._room())

    def _room(self) -> int:
        """Tokens that one more chunk may have, as the executor limits steps."""
        degree, snapshot = len(self.group), self._table.snapshot
        riders = len(self._riders)
        if riders + len(self._works) >= snapshot.max_rows * degree:
            return 0
        padded = riders + sum([-(-work.tokens // degree) for work in self._works])
        return (snapshot.max_chunk_tokens - padded) * degree

    # ---- the step --------------------------------------------------------------------

    def finish(self, seq: int) -> PrefillStep | None:
        """The step; None if there are no prompts in it, so that it is not needed.

        Blocks of riders who do not go along are given back.
        """
        carried = bool(self._chunks) and self._carries(self._works)
        riders = self._riders if carried else []
        if not carried:
            for view, home in self._riders:
                self._table.free[home] += view.tail is None
            self._riders = []
        if not self._chunks:
            return None
        chunks, keep = [], []
        every = [(view, 1, (Share(home, 1),)) for view, home in riders] + self._chunks
        for view, tokens, shares in every:
            end = view.computed + tokens
            last = end == view.length
            chunks.append(Chunk(request=view.id, start=view.computed, length=tokens, last=last))
            keep.append(Placement(request=view.id, shares=shares))
        return PrefillStep(seq=seq, group=self.group, chunks=tuple(chunks), keep=tuple(keep))

    @property
    def riders(self) -> list[RequestView]:
        """Who rides along, after `finish`."""
        return [view for view, _ in self._riders]


def _largest(seconds: Callable[[int], float], limit: float, most: int) -> int:
    """The most tokens, up to `most`, that take no longer than `limit`; 1 at least. Exactly, for
    times rise in steps where programs have sizes.
    """
    if seconds(most) <= limit:
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        if seconds(middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def spread(
    view: RequestView,
    homes: Collection[InstanceId],
    free: Sequence[int],
    blocks: int,
    block_size: int,
) -> dict[InstanceId, int]:
    """New blocks of a request by instance, so that its KV lies as evenly as can be: reading it
    takes as long as its fullest instance.
    """
    held = dict.fromkeys(homes, 0)
    held.update({share.instance: share.tokens for share in view.kv if share.instance in held})
    taken = dict.fromkeys(held, 0)
    while blocks:
        roomy = sorted((home for home in held if taken[home] < free[home]), key=lambda h: held[h])
        level = (sum([held[home] for home in roomy]) + blocks * block_size) / len(roomy)
        for home in roomy:
            wanted = max(1, round((level - held[home]) / block_size))
            more = min(wanted, free[home] - taken[home], blocks)
            taken[home] += more
            held[home] += more * block_size
            blocks -= more
    return {home: count for home, count in taken.items() if count}
