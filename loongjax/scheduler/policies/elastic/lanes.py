"""Which instances prompts get: a lane of several for one that takes long, one for all others.

A lane is a group on which prompts that take long are computed chunk by chunk, several in one step
if they fit. Their KV lies evenly on it, so that every chunk can run there. A prompt gets as many
instances as it can use: the constant part of a step, on all of them, is to be small beside the
work. Those that decode keep as many instances as they need; and whoever waits for a lane makes
those in use larger, or waits there in order, if there is no room for another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.plan import InstanceId, RequestId, RequestView
from loongjax.scheduler.policies.seats import parts
from loongjax.scheduler.policies.worktable import Worktable
from loongjax.scheduler.scaling import tokens_in_time

_CONSTANT_PART = 0.15
"""Part of a prompt's work that constants may come to on the instances that it gets."""
_DECODING_PART = 0.6
"""Part of the time from token to token that decodes may take on instances left to them; short
prompts get the rest."""

LaneOf = dict[RequestId, frozenset[InstanceId]]


class Lanes:
    """The lanes of one plan."""

    def __init__(self, table: Worktable, cost: CostModel, pace_s: float) -> None:
        self._table = table
        self._cost = cost
        self._pace_s = pace_s

    # ---- sizes -----------------------------------------------------------------------

    @cached_property
    def in_time(self) -> int:
        """KV tokens of one request on one instance that a decode step reads in time."""
        most = max(self._table.capacity) * self._table.snapshot.block_size
        return tokens_in_time(self._pace_s, most, self._cost)

    def is_small(self, tokens: int) -> bool:
        """Whether KV of one request may lie beside that of others on one instance."""
        return 2 * tokens <= self.in_time

    def least(self, view: RequestView) -> int:
        """How many instances a prompt needs: for its memory, and to decode in time if possible."""
        table = self._table
        everything, blocks = len(table.free), table.blocks(table.granted(view))
        least = -(-blocks // max(table.capacity))
        if view.length <= self.in_time * everything:
            least = max(least, -(-view.length // max(1, self.in_time)))
        return min(least, everything)

    def _usable(self, view: RequestView) -> int:
        """How many it can use."""
        work = self._cost.prefill(1, [ChunkWork(view.length, 0)])
        usable = 1
        for degree in self._table.snapshot.topology.degrees:
            constant = self._cost.prefill(degree, [ChunkWork(1, 0)])
            if constant * degree <= _CONSTANT_PART * work:
                usable = degree
        return usable

    @cached_property
    def decoding(self) -> int:
        """Instances that are left to decodes and short prompts: one at least, and as many as all
        who decode and hold little need together.
        """
        everything = len(self._table.free)
        small = [v.computed for v in self._table.snapshot.running if self.is_small(v.computed)]
        if not small:
            return min(1, everything - 1)
        rows, tokens, longest = len(small), sum(small), max(small)
        for instances in range(1, everything):
            work = DecodeWork(-(-rows // instances), tokens // instances, 1, longest)
            if self._cost.decode(1, work) <= _DECODING_PART * self._pace_s:
                return instances
        return everything - 1

    # ---- lanes -----------------------------------------------------------------------

    @cached_property
    def in_use(self) -> list[frozenset[InstanceId]]:
        """Instances of prompts that are begun on several, and of those who decode on several since
        they hold much; those that share any are one lane.
        """
        begun = [view.homes for view in self._table.begun if view.uncomputed > 1]
        decoding = [
            view.homes
            for view in self._table.snapshot.running
            if len(view.kv) > 1 and not self.is_small(view.computed)
        ]
        return parts([homes for homes in begun if len(homes) > 1] + decoding)

    @cached_property
    def busy(self) -> frozenset[InstanceId]:
        """Instances of any lane in use."""
        return frozenset[InstanceId]().union(*self.in_use)

    def choose(self, longs: Iterable[RequestView]) -> LaneOf:
        """A lane for each prompt that takes long, the most urgent first."""
        lanes = [*self.in_use]
        waiting = [0] * len(lanes)
        found: dict[RequestId, int] = {}
        for view in longs:
            if view.kv:
                number = next((n for n, lane in enumerate(lanes) if view.homes <= lane), None)
            else:
                number = self._place(view, lanes, waiting)
            if number is not None:
                found[view.id] = number
                waiting[number] += 1
        return {name: lanes[number] for name, number in found.items()}

    def _place(
        self, view: RequestView, lanes: list[frozenset[InstanceId]], waiting: list[int]
    ) -> int | None:
        """The number of the lane of a new prompt: a new one, or one that grows for it."""
        least, usable = self.least(view), self._usable(view)
        spare = self._spare(frozenset[InstanceId]().union(*lanes))
        size = max(least, min(usable, len(spare)))
        if spare and len(spare) >= (least if not lanes else max(least, usable)):
            lane = self._cover(frozenset(spare[:1]), spare, size)
            if lane is not None:
                lanes.append(lane)
                waiting.append(0)
                return len(lanes) - 1
        if not lanes:
            lane = self._cover(frozenset(), list(self._table.everything), size)
            if lane is None:
                return None
            lanes.append(lane)
            waiting.append(0)
            return 0
        number = min(range(len(lanes)), key=lambda n: (waiting[n] / len(lanes[n]), n))
        size = max(least, min(usable, len(lanes[number]) + len(spare)))
        if size > len(lanes[number]):
            grown = self._cover(lanes[number], spare, size)
            if grown is None and len(lanes[number]) < least:
                grown = self._cover(lanes[number], list(self._table.everything), least)
                if grown is None:
                    return None
            lanes[number] = grown or lanes[number]
        return number

    def _spare(self, taken: frozenset[InstanceId]) -> list[InstanceId]:
        """Instances that a lane may take, the best first: those with the fewest decodes."""
        table = self._table
        others = [i for i in table.everything if i not in taken]
        others.sort(key=lambda i: (table.tenants(i).rows, -table.free[i], i))
        return others[: max(0, len(others) - self.decoding)]

    def _cover(
        self, base: frozenset[InstanceId], more: Sequence[InstanceId], size: int
    ) -> frozenset[InstanceId] | None:
        """A group of so many around `base`, with the first of `more` if they form one."""
        topology = self._table.snapshot.topology
        best = sorted(base.union([i for i in more if i not in base][: max(0, size - len(base))]))
        if len(best) == size and topology.contains(tuple(best)):
            return frozenset(best)
        seed = base or frozenset(more[:1])
        cover = topology.smallest_cover(seed, base.union(more), size)
        return None if cover is None else frozenset(cover)
