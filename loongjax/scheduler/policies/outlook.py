"""What the prompts of one plan can count on: instances, when they are idle, what they cost.

Answers from the snapshot alone. How much longer answers become is not known; as many tokens
are expected as those who decode on idle instances have produced so far, in the mean: whoever is
seen at a random moment has, on average, as much before as behind. One answer of a typical
length is mixed in, for the first requests have produced nothing yet.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.plan import InstanceId, RequestView
from loongjax.scheduler.allocate import Candidate
from loongjax.scheduler.dispatch import Occupied, Openings
from loongjax.scheduler.policies.moving import rooms, targets_in_order
from loongjax.scheduler.policies.worktable import Worktable

_MOST_LATE = 2
"""How many of the prefill steps in flight a prompt may think of waiting for."""


class Outlook:
    """Instances for prompts, as the plan has left them so far."""

    def __init__(self, table: Worktable, cost: CostModel, typical_answer: int) -> None:
        self._table = table
        self._cost = cost
        self._typical_answer = typical_answer

    # ---- time ------------------------------------------------------------------------

    @cached_property
    def beat(self) -> float:
        """How long a decode step takes, about [s]: if each instance decodes alone."""
        table = self._table
        rows = len(table.snapshot.running)
        groups = max(1, sum(not table.is_empty(instance) for instance in table.everything))
        used = sum(table.capacity) - sum(table.free)
        work = DecodeWork(-(-rows // groups), used * table.snapshot.block_size // groups, 1)
        return self._cost.decode(table.snapshot.topology.degrees[0], work) if rows else 0.0

    @cached_property
    def answer(self) -> int:
        """Tokens that whoever decodes is expected to add."""
        near = self._table.near
        produced = sum([view.generated for view in near])
        return -(-(self._typical_answer + produced) // (1 + len(near)))

    @cached_property
    def late_waits(self) -> dict[InstanceId, float]:
        """How long until the next few prefill steps in flight end: half their time [s]."""
        table = self._table
        groups: dict[int, list[InstanceId]] = defaultdict(list)
        for view in table.snapshot.instances:
            if view.id in table.late and view.busy_seq is not None:
                groups[view.busy_seq].append(view.id)
        work: dict[int, list[ChunkWork]] = {seq: [] for seq in groups}
        for request in (*table.snapshot.running, *table.begun):
            if request.last_seq in work:
                work[request.last_seq].append(ChunkWork(max(1, request.computed), 0))
        ends = [
            (self._cost.prefill(len(groups[seq]), chunks) / 2, seq)
            for seq, chunks in work.items()
            if chunks
        ]
        soonest = sorted(ends)[:_MOST_LATE]
        return {instance: wait for wait, seq in soonest for instance in groups[seq]}

    # ---- instances -------------------------------------------------------------------

    @cached_property
    def _owed(self) -> frozenset[InstanceId]:
        """Where decodes go before the next prompt, for the last one put them off."""
        table = self._table
        decoding = (view for view in table.near if view.id not in table.stuck)
        return frozenset(home for view in decoding for home in table.put_off_on(view))

    @property
    def ready(self) -> set[InstanceId]:
        """Idle, and no decode goes before the next prompt there."""
        return self._table.idle - self._owed

    def candidates(self, head: RequestView, used: set[InstanceId]) -> list[Candidate]:
        """Instances that prompts may run on, `head` being the first; none that is `used` by
        prompts of this plan.

        Those that are ready; and if `head` would profit from more by more than a decode step
        takes, or could not be held by them, those that will be: soon, or after a prefill step.
        """
        table = self._table
        waits = dict.fromkeys(self.ready, 0.0)
        room = sum(table.capacity[instance] for instance in waits)
        if room < table.blocks(table.granted(head)) or self._profits_from_more(head, len(waits)):
            waits |= dict.fromkeys(table.everything - table.late - used - self.ready, self.beat)
            if table.late and self._profits_from_more(head, len(waits)):
                waits |= self.late_waits
        spare = rooms(table, self.answer)
        around = sum([max(0, spare[i]) for i in spare if i not in table.late])
        targets = targets_in_order(table, spare, table.everything - table.late - used)[:2]
        usable = frozenset(table.idle | table.soon).union(waits)
        return [
            self._candidate(i, wait, around - max(0, spare[i]), targets, usable)
            for i, wait in sorted(waits.items())
        ]

    def _candidate(
        self,
        instance: InstanceId,
        wait: float,
        elsewhere: int,
        targets: Sequence[InstanceId],
        usable: frozenset[InstanceId],
    ) -> Candidate:
        """KV of who does not decode cannot be moved away, nor where there is no room for it
        `elsewhere`, on all other instances where nobody prefills, nor where no group of `usable`
        ones leads to the first of its targets.
        """
        table = self._table
        tenants = table.tenants(instance)
        used = table.capacity[instance] - table.free[instance]
        needed = used + table.blocks(self.answer) * tenants.rows
        moves = used <= tenants.blocks and needed <= elsewhere
        if moves and used:
            target = next((i for i in targets if i != instance), None)
            moves = target is not None and self._leads(instance, target, usable)
        return Candidate(
            instance=instance,
            free=table.spare(instance),
            blocks=table.capacity[instance],
            wait=wait,
            paused=tenants.paused,
            moved=used * table.snapshot.block_size if moves else None,
        )

    def _leads(self, source: InstanceId, target: InstanceId, usable: frozenset[InstanceId]) -> bool:
        topology = self._table.snapshot.topology
        return topology.smallest_cover(frozenset((source, target)), usable) is not None

    def elsewhere(self, candidates: Sequence[Candidate]) -> int:
        """Free blocks, for the KV of decodes, on instances that are no candidates."""
        table = self._table
        others = table.everything - table.late - {candidate.instance for candidate in candidates}
        return sum(table.free[instance] for instance in others)

    def openings(self, candidates: Sequence[Candidate], most: int) -> Openings:
        """Those of the candidates that are idle now or in a moment, as `dispatch` counts; each
        takes at most so many blocks.
        """
        soon = [candidate for candidate in candidates if candidate.wait <= self.beat]
        occupied = [
            Occupied(c.paused, math.inf, min(c.free, most))
            if c.moved is None
            else Occupied(c.paused, self._cost.migrate(c.moved), min(c.blocks, most))
            for c in soon
            if c.paused
        ]
        return Openings(
            free=len(soon) - len(occupied),
            blocks=sum([min(c.free, most) for c in soon if not c.paused]),
            occupied=tuple(sorted(occupied)),
            wait=self.answer * self.beat,
        )

    def _profits_from_more(self, head: RequestView, instances: int) -> bool:
        """Whether all instances would compute `head` sooner than these, by more than a beat."""
        degrees = self._table.snapshot.topology.degrees
        largest = max((degree for degree in degrees if degree <= instances), default=None)
        if largest is None:
            return True
        work = [ChunkWork(max(1, head.uncomputed), head.computed)]
        times = [self._cost.prefill(degree, work) for degree in (largest, degrees[-1])]
        return times[0] - times[1] > self.beat
