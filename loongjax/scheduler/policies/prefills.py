"""Prompts in `LoongServe`: the four steps of the paper in one plan.

In line: while a prompt waits that has no patience left, none behind it is begun. It waits for
memory (decodes go on meanwhile, and end), until pausing decodes is worth it, or for instances
that are busy: those that are idle already are kept for it if the rest will be so in a moment.

Between two prompts on an instance, everybody who decodes there gets a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, islice, takewhile

from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.plan import (
    Chunk,
    Group,
    InstanceId,
    MigrateStep,
    Placement,
    PrefillStep,
    RequestView,
    Share,
)
from loongjax.scheduler.allocate import Allocation, Candidate, Demand, allocate
from loongjax.scheduler.batching import Limits, PrefillBatch, few_degrees, split_prefill
from loongjax.scheduler.dispatch import (
    Prompt,
    compute_allows,
    dispatch,
    memory_allows,
    tipping_point,
)
from loongjax.scheduler.policies.chunks import next_chunk
from loongjax.scheduler.policies.moving import Clearing, clear
from loongjax.scheduler.policies.outlook import Outlook
from loongjax.scheduler.policies.worktable import Worktable
from loongjax.scheduler.scaling import Need, Pace, Room, scale_down, shares, tokens_in_time

_ROUNDS = 8
"""How often prompts are dispatched, or overtaken, in one plan. More would matter only when
very many instances become idle at once."""

_MOST_PROMPTS = 64
"""How many prompts in line are looked at in one round."""


class Prefills:
    """The prefill and migrate steps of one plan.

    Attributes:
      steps: What was decided so far, in order.
    """

    def __init__(
        self,
        table: Worktable,
        cost: CostModel,
        *,
        typical_answer: int,
        migrates: bool,
        decode_s: float,
        patience: float,
        block_s: float,
    ) -> None:
        """Comes after those decodes that have no room, for they go first."""
        self._table = table
        self._cost = cost
        self._migrates = migrates
        self._outlook = Outlook(table, cost, typical_answer)
        self._used: set[InstanceId] = set()
        self._decode_s = decode_s
        self._patience, self._block_s = patience, block_s
        self._most_instances: int | None = None
        snapshot = table.snapshot
        self._headroom, self._block_size = table.headroom, snapshot.block_size
        self._longest = table.longest_prefill
        self._limits = Limits(tokens=snapshot.max_chunk_tokens, chunks=snapshot.max_rows)
        self._most = max(table.capacity)
        self._degrees = few_degrees(snapshot.topology.degrees)
        self.steps: list[PrefillStep | MigrateStep] = []

    def seat(self, now: float) -> None:
        """Begins prompts in line until one has to wait that has lost its patience."""
        in_flight = self._table.snapshot.in_flight
        line = (view for view in self._table.line if view.id not in in_flight)
        views = list(islice(line, _MOST_PROMPTS))
        prompts = [self._whole(view) for view in views]
        for _ in range(_ROUNDS):
            if not views or not self._outlook.ready:
                return
            head, first = views[0], prompts[0]
            patient = self._is_patient(head, now)
            if first is None:
                count = self._seat_next(head)
            elif not self._has_memory(first):
                count = 0
            elif patient and self._would_block(head):
                count = self._seat_beside(head, first)
            else:
                count = self._seat_whole(views, list(_until_none(prompts)))
            if not count and not patient:
                return
            gone = count or 1
            more = list(islice(line, gone))
            views = views[gone:] + more
            prompts = prompts[gone:] + [self._whole(view) for view in more]

    def anyone_waits(self, now: float) -> bool:
        """Whether a prompt that this plan does not begin waits for more than memory."""
        table = self._table
        if table.preempted:
            return True
        busy = table.snapshot.in_flight
        line = (v for v in table.line if v.id not in busy and v.id not in table.placed)
        head = next(line, None)
        if head is None:
            return False
        if head.kv or self._is_patient(head, now):
            return True
        return self._has_memory(self._prompt(head))

    def _whole(self, view: RequestView) -> Prompt | None:
        """A prompt that one step can compute all of, over no KV; None: another one."""
        prompt = self._prompt(view)
        return None if view.kv or prompt.tokens > self._longest else prompt

    # ---- who lets others go first ----------------------------------------------------

    def _is_patient(self, view: RequestView, now: float) -> bool:
        """Whether others may overtake it still."""
        if not self._patience:
            return False
        return now - view.arrival < self._patience * self._alone_s(view)

    def _would_block(self, view: RequestView) -> bool:
        """Whether it would keep all instances from others for long."""
        return self._alone_s(view) > self._block_s

    def _alone_s(self, view: RequestView) -> float:
        work = [ChunkWork(max(1, view.uncomputed), view.computed)]
        return self._cost.prefill(self._degrees[-1], work)

    def _seat_beside(self, head: RequestView, prompt: Prompt) -> int:
        """Begins a prompt that takes long, alone, on instances that leave one to others, unless it
        needs all; says whether it did.
        """
        self._limit_for(prompt)
        everything = self._table.everything
        needed = -(-prompt.tokens // self._limits.tokens)
        if needed < len(everything):
            soon = [i for i, wait in self._outlook.late_waits.items() if wait <= self._block_s]
            others = (everything - self._table.late - self._used).union(soon)
            self._most_instances = len(others) - 1
        try:
            return self._seat_whole([head], [prompt]) if self._most_instances != 0 else 0
        finally:
            self._most_instances = None

    # ---- whole prompts ---------------------------------------------------------------

    def _seat_whole(self, line: Sequence[RequestView], prompts: Sequence[Prompt]) -> int:
        """Begins prompts, those of the first in line, from the first on, for which there is memory;
        says how many.
        """
        self._limit_for(prompts[0])
        candidates = self._outlook.candidates(line[0], self._used)
        moving = self._begin(line, prompts, candidates) if self._migrates else None
        if moving is None:
            fixed = [each._replace(moved=None) if each.moved else each for each in candidates]
            return self._begin(line, prompts, fixed) or 0
        return moving

    @cached_property
    def _in_time(self) -> int:
        """KV tokens of one request on one instance that a decode step reads in time."""
        most = self._table.snapshot.max_chunk_tokens
        return tokens_in_time(self._decode_s, most, self._cost)

    @cached_property
    def _tip(self) -> int:
        return tipping_point(self._degrees[0], self._cost)

    def _limit_for(self, prompt: Prompt) -> None:
        """Groups are to be large enough for KV that is read in time, if any are for this one."""
        table = self._table
        tokens, self._most = table.snapshot.max_chunk_tokens, max(table.capacity)
        in_time = self._in_time
        if prompt.tokens <= in_time * self._degrees[-1] and in_time < tokens:
            tokens, self._most = in_time, table.blocks(in_time + prompt.growth)
        self._limits = Limits(tokens=tokens, chunks=table.snapshot.max_rows)

    def _has_memory(self, prompt: Prompt) -> bool:
        """The memory test of `dispatch` for the first in line alone: if it fails, all is said."""
        table = self._table
        if prompt.blocks > sum(table.free):
            return False
        plenty = table.has_plenty(prompt.blocks)
        return plenty or memory_allows([prompt], table.pool(table.everything)) == 1

    def _prompt(self, view: RequestView) -> Prompt:
        tokens = view.prompt + view.generated
        growth = view.max_tokens - view.generated - 1
        if self._headroom is not None and growth > self._headroom:
            growth = self._headroom
        return Prompt(tokens, growth, -(-(tokens + growth) // self._block_size))

    def _begin(
        self,
        views: Sequence[RequestView],
        prompts: Sequence[Prompt],
        candidates: Sequence[Candidate],
    ) -> int | None:
        """Begins some of the prompts in line, or keeps instances for them (0).

        Returns:
          How many; None if decodes were to be moved away, and that cannot be done.
        """
        if any(candidate.wait for candidate in candidates):  # few enough to be idle together
            first = self._allocate(prompts[:1], prompts[1:], candidates)
            group = () if first is None else first.group
            candidates = [candidate for candidate in candidates if candidate.instance in group]
        count = self._dispatch(prompts, candidates)
        while count:
            got = self._allocate(prompts[:count], prompts[count:], candidates)
            busy = count if got is None else self._keep_busy(prompts[:count], got.group)
            if busy < count:  # fewer instances than `dispatch` reckoned with
                count = busy
                continue
            if got is not None and got.migrate:
                return 0 if self._migrate(got) else None
            if got is not None and self._launch(views[:count], prompts[:count], got):
                return count
            if got is not None and self._waits_for(got.group):
                return 0
            count //= 2
        return 0

    def _dispatch(self, prompts: Sequence[Prompt], candidates: Sequence[Candidate]) -> int:
        """How many to begin: step 1, for those that have room anywhere."""
        table = self._table
        room = sum([candidate.free for candidate in candidates])
        room += self._outlook.elsewhere(candidates)
        ends = list(takewhile(room.__ge__, accumulate(prompt.blocks for prompt in prompts)))
        if not ends:
            return 0
        return dispatch(
            prompts[: len(ends)],
            _weight(prompts[len(ends) :]),
            None if table.has_plenty(ends[-1]) else table.pool(table.everything),
            self._outlook.openings(candidates, self._most),
            self._degrees,
            self._cost,
            tip=self._tip,
        )

    def _keep_busy(self, prompts: Sequence[Prompt], group: Group) -> int:
        """How many of these keep a group busy up to its tipping point, at least one."""
        tokens = [prompt.tokens for prompt in prompts]
        return max(1, compute_allows(tokens, len(group), self._tip))

    def _allocate(
        self,
        prompts: Sequence[Prompt],
        behind: Sequence[Prompt],
        candidates: Sequence[Candidate],
    ) -> Allocation | None:
        """Instances whose surroundings have room for what these prompts will become."""
        demand = Demand(
            prompts=prompts,
            behind=_weight(behind),
            elsewhere=self._outlook.elsewhere(candidates),
            most=self._most_instances,
        )
        topology = self._table.snapshot.topology
        while candidates:
            got = allocate(demand, candidates, topology, self._limits, self._cost)
            if got is None or self._region_allows(prompts, got.group):
                return got
            candidates = [c for c in candidates if c.instance not in got.group]
        return None

    def _region_allows(self, prompts: Sequence[Prompt], group: Group) -> bool:
        """The memory test, within what KV that lies on a group can grow to."""
        table = self._table
        region = table.reach(frozenset(group))
        if len(region) == len(table.free):
            return True  # the test of `dispatch`
        return memory_allows(prompts, table.pool(region)) == len(prompts)

    def _waits_for(self, group: Group) -> bool:
        """Keeps what is idle of a group whose others are busy, unless with prompts."""
        if self._outlook.ready.issuperset(group):
            return False
        if self._table.late.isdisjoint(group):
            self._table.hold(self._outlook.ready.intersection(group))
        return True

    # ---- steps -----------------------------------------------------------------------

    @property
    def _next_seq(self) -> int:
        return self._table.snapshot.next_seq + len(self.steps)

    def _migrate(self, got: Allocation) -> bool:
        """Clears instances for prompts, or waits until that can begin."""
        sources, group = frozenset(got.migrate), frozenset(got.group)
        clearing: Clearing | None = clear(
            self._table, sources, group | self._used, self._outlook.answer
        )
        if clearing is None:
            return False
        if not self._waits_for(clearing.group):
            step = MigrateStep(seq=self._next_seq, group=clearing.group, moves=clearing.moves)
            self.steps.append(step)
            self._table.claim(clearing.group)
        self._waits_for(got.group)
        return True

    def _launch(
        self, views: Sequence[RequestView], prompts: Sequence[Prompt], got: Allocation
    ) -> bool:
        """Begins prompts on a group that is ready, if it can be split for them."""
        table = self._table
        if not self._outlook.ready.issuperset(got.group):
            return False
        free = [table.spare(instance) for instance in got.group]
        topology = table.snapshot.topology
        batches = split_prefill(prompts, got.group, free, topology, self._limits, self._cost)
        for batch in batches or ():
            self._add(batch, [views[i] for i in batch.prompts], [prompts[i] for i in batch.prompts])
        return batches is not None

    def _add(
        self, batch: PrefillBatch, views: Sequence[RequestView], prompts: Sequence[Prompt]
    ) -> None:
        """One step; its KV is retained on the smallest part of the group."""
        table = self._table
        needs = [Need(table.blocks(prompt.tokens), prompt.blocks) for prompt in prompts]
        rooms = [
            Room(
                instance=i,
                spare=table.spare(i),
                used=table.capacity[i] - table.free[i],
                decodes=table.tenants(i).paused > 0,
            )
            for i in batch.group
        ]
        chunks, keep = [], []
        for view, pieces in zip(
            views, scale_down(needs, rooms, self._pace, table.snapshot.topology), strict=True
        ):
            kept = shares(pieces, view.length, table.snapshot.block_size)
            chunks.append(Chunk(request=view.id, start=0, length=view.length, last=True))
            keep.append(Placement(request=view.id, shares=kept))
            placed = replace(view, computed=view.length, kv=tuple(sorted(kept)))
            table.place(placed, pieces, new=True)
        self._append(batch.group, tuple(chunks), tuple(keep))

    @cached_property
    def _pace(self) -> Pace:
        """How quickly KV on one instance is read, if it is of one request: the slowest case."""
        size, cost = self._table.snapshot.block_size, self._cost

        def step_s(blocks: int) -> float:
            return cost.decode(1, DecodeWork(1, blocks * size, 1, blocks * size))

        return Pace(limit_s=self._decode_s, step_s=step_s)

    def _append(self, group: Group, chunks: tuple[Chunk, ...], keep: tuple[Placement, ...]) -> None:
        self.steps.append(PrefillStep(seq=self._next_seq, group=group, chunks=chunks, keep=keep))
        self._used.update(group)
        self._table.claim(group)

    # ---- prompts in parts ------------------------------------------------------------

    def _seat_next(self, view: RequestView) -> int:
        """Computes the next chunk of a prompt; says whether it did."""
        table = self._table
        if not view.kv and not memory_allows([self._prompt(view)], table.pool(table.everything)):
            return 0
        found = next_chunk(table, view, self._outlook.ready, self._degrees, self._cost)
        if found is None:
            soon = table.everything - table.late - self._used
            later = next_chunk(table, view, soon, self._degrees, self._cost)
            if later is not None:
                self._waits_for(later.group)
            return 0
        computed = view.computed + found.chunk.length
        table.place(
            replace(view, computed=computed, kv=_merged(view, found.placement)), found.taken
        )
        self._append(found.group, (found.chunk,), (found.placement,))
        return 1


def _until_none(prompts: Iterable[Prompt | None]) -> Iterator[Prompt]:
    """The first ones, up to one that no step can compute all of."""
    for prompt in prompts:
        if prompt is None:
            return
        yield prompt


def _weight(prompts: Sequence[Prompt]) -> float:
    """The sum of 1 / input [1/token]."""
    return sum([1.0 / prompt.tokens for prompt in prompts], 0.0)


def _merged(view: RequestView, placement: Placement) -> tuple[Share, ...]:
    tokens = dict(view.kv)
    for instance, more in placement.shares:
        tokens[instance] = tokens.get(instance, 0) + more
    return tuple(Share(instance, tokens[instance]) for instance in sorted(tokens))
