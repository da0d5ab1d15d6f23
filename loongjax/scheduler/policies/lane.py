"""A lane: a fixed group of instances that serves by itself, as engines without elasticity do.

Knows how requests that live on it get memory, decode, and are begun; which lanes there are,
and who goes where, policies decide. KV lies evenly on all instances of a lane.

Promises: whoever has no room for its next tokens takes it from those behind it in line on the
same lane, the last one first; so the first in line always gets on. New prompts are admitted in
line, by the memory test of `dispatch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from loongjax.costmodel.protocol import CostModel
from loongjax.plan import (
    Chunk,
    DecodeStep,
    Group,
    InstanceId,
    Placement,
    PrefillStep,
    Rejection,
    RequestView,
    Share,
    Step,
    Topology,
    step_requests,
)
from loongjax.scheduler.dispatch import Prompt, memory_allows
from loongjax.scheduler.policies.retention import in_order
from loongjax.scheduler.policies.worktable import Worktable, line_key
from loongjax.scheduler.scaling import balance, choose_masters, masters_needed

_MOST_PROMPTS = 64
"""How many new prompts are looked at for one step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What one prefill step may take.

    Attributes:
      tokens: Prompt tokens.
      splits: Whether the last prompt may be cut to fill it up; if not, a first prompt that is
        longer has it alone.
    """

    tokens: int
    splits: bool


def lanes(topology: Topology, degree: int) -> list[Group]:
    """Disjoint groups of a degree, as many as a walk over the groups finds."""
    found: list[Group] = []
    used: set[InstanceId] = set()
    for group in topology.groups(degree):
        if used.isdisjoint(group):
            found.append(group)
            used.update(group)
    return found


class Lane:
    """A lane in one plan.

    Attributes:
      group: Its instances.
    """

    def __init__(self, table: Worktable, group: Group, cost: CostModel) -> None:
        self.group = group
        self._table = table
        self._cost = cost
        self._members = frozenset(group)
        self._tokens = 0
        self._chunks: list[Chunk] = []
        self._keep: list[Placement] = []

    # ---- who is here -----------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether a step may be launched on it."""
        return self._table.idle.issuperset(self._members)

    @property
    def free(self) -> int:
        """Free blocks."""
        return sum(self._table.free[instance] for instance in self.group)

    @property
    def capacity(self) -> int:
        """All blocks."""
        return sum(self._table.capacity[instance] for instance in self.group)

    def holders(self) -> list[RequestView]:
        """Who has KV here and is in no step, in line."""
        in_flight = self._table.snapshot.in_flight
        here = [view for view in self._table.census if view.kv[0].instance in self._members]
        return sorted((view for view in here if view.id not in in_flight), key=line_key)

    def owes_tokens(self) -> bool:
        """Whether the last prompts here put off somebody who decodes."""
        return any(self._table.put_off_on(view) for view in self.holders() if _decodes(view))

    # ---- decodes ---------------------------------------------------------------------

    def decode(self, most: int) -> list[tuple[RequestView, InstanceId]]:
        """Gives the requests that were served longest ago, `most` at most, a home for a token."""
        table = self._table
        decoding = [view for view in self.holders() if _decodes(view)]
        turn = sorted(decoding, key=lambda view: -1 if view.last_seq is None else view.last_seq)
        rows = []
        for view in sorted(turn[:most], key=line_key):
            if view.id in table.preempted or not self._make_room(view, 1):
                continue
            home = view.tail.instance if view.tail is not None else self._roomiest()
            table.free[home] -= view.tail is None
            rows.append((view, home))
        return rows

    def decode_step(self, seq: int, rows: Sequence[tuple[RequestView, InstanceId]]) -> DecodeStep:
        """These requests alone."""
        degree, tokens = len(self.group), sum(view.computed for view, _ in rows)
        least = -(-len(rows) // self._table.snapshot.max_rows)
        masters = masters_needed(len(rows), tokens, degree, least, self._cost)
        self._table.claim(self.group)
        return DecodeStep(seq=seq, group=self.group, rows=choose_masters(rows, self.group, masters))

    def carry(self, rows: Sequence[tuple[RequestView, InstanceId]]) -> None:
        """Lets these requests decode within a prefill step, as chunks of one token."""
        for view, home in rows:
            self._add(view, 1, (Share(home, 1),))

    # ---- prompts ---------------------------------------------------------------------

    def begin(self, line: Sequence[RequestView], budget: Budget) -> bool:
        """Adds chunks of prompts; says whether it added any.

        Args:
          line: Those begun on any lane and new ones, in the order in which they are wanted.
          budget: How much.
        """
        table, before = self._table, len(self._chunks)
        new = list(islice((view for view in line if not view.kv), _MOST_PROMPTS))
        prompts = [self._prompt(view) for view in new]
        allowed = memory_allows(prompts, table.pool(self._members)) if prompts else 0
        admitted = {view.id for view in new[:allowed]}
        open_to_new = True
        for view in line:
            if not view.kv:
                open_to_new = open_to_new and view.id in admitted and self._begin(view, budget)
            elif view.kv[0].instance in self._members and view.id not in table.preempted:
                # it holds memory, so it goes on whatever others wait for
                open_to_new = self._begin(view, budget) and open_to_new
        return len(self._chunks) > before

    def prefill_step(self, seq: int) -> PrefillStep:
        """All that was added: at least one chunk."""
        self._table.claim(self.group)
        return PrefillStep(
            seq=seq, group=self.group, chunks=tuple(self._chunks), keep=tuple(self._keep)
        )

    @property
    def rows_left(self) -> int:
        """How many more requests a step takes."""
        return self._table.snapshot.max_rows * len(self.group) - len(self._chunks)

    def _begin(self, view: RequestView, budget: Budget) -> bool:
        """Adds the next chunk of a prompt, if it has room; says whether others may follow."""
        left = self._left(budget)
        tokens = min(view.uncomputed, left)
        if self.rows_left < 1 or tokens < 1:
            return False
        if tokens < view.uncomputed and not budget.splits:
            if self._chunks:
                return False
            limit = self._table.snapshot.max_chunk_tokens * len(self.group)
            tokens = min(view.uncomputed, limit)
        self._make_room(view, tokens)
        tail = 0 if view.tail is None else view.tail.tokens
        tokens = min(tokens, tail + self.free * self._table.snapshot.block_size)
        if tokens < 1:
            return False
        blocks = self._table.blocks(max(0, tokens - tail))
        free = {instance: self._table.free[instance] for instance in self.group}
        taken = balance(free, blocks) if blocks else {}
        shares = in_order(view, taken, free, tokens, self._table.snapshot.block_size)
        self._add(view, tokens, shares)
        kv = dict(view.kv)
        for instance, kept in shares:
            kv[instance] = kv.get(instance, 0) + kept
        after = tuple(Share(instance, kv[instance]) for instance in sorted(kv))
        view = replace(view, computed=view.computed + tokens, kv=after)
        self._table.place(view, taken.items())
        return True

    def _add(self, view: RequestView, tokens: int, shares: tuple[Share, ...]) -> None:
        end = view.computed + tokens
        self._chunks.append(
            Chunk(request=view.id, start=view.computed, length=tokens, last=end == view.length)
        )
        self._keep.append(Placement(request=view.id, shares=shares))
        self._tokens += self._padded(tokens)

    def _left(self, budget: Budget) -> int:
        """Tokens that one more chunk may have."""
        limit = self._table.snapshot.max_chunk_tokens * len(self.group)
        return min(budget.tokens, limit) - self._tokens

    def _padded(self, tokens: int) -> int:
        degree = len(self.group)
        return -(-tokens // degree) * degree

    # ---- memory ----------------------------------------------------------------------

    def _prompt(self, view: RequestView) -> Prompt:
        granted = self._table.granted(view)
        return Prompt(view.length, max(0, granted - view.length), self._table.blocks(granted))

    def _roomiest(self) -> InstanceId:
        return max(self.group, key=lambda instance: (self._table.free[instance], -instance))

    def _make_room(self, view: RequestView, tokens: int) -> bool:
        """Preempts those behind a request until it has room; says whether it has."""
        table = self._table
        tail = 0 if view.tail is None else view.tail.tokens
        needed = table.blocks(max(0, tokens - tail))
        if needed <= self.free:
            return True
        seated = {chunk.request for chunk in self._chunks}
        behind = [
            other
            for other in self.holders()
            if line_key(other) > line_key(view) and other.id not in seated
        ]
        while behind and needed > self.free:
            table.preempt(behind.pop())
        return needed <= self.free


def lanes_to_go_on(
    table: Worktable, groups: Iterable[Group], steps: Iterable[Step]
) -> frozenset[Group]:
    """Lanes that decode on by themselves (`Plan.ahead`): all, unless somebody who decodes has no
    step. Who waits for instances otherwise, policies know.
    """
    seated = {name for step in steps for name in step_requests(step)}
    if table.preempted or any(view.id not in seated for view in table.resting):
        return frozenset()
    return frozenset(groups)


def preempt_strangers(table: Worktable, groups: Sequence[Group]) -> None:
    """Drops KV that does not lie in one lane, as another policy may have left it."""
    of = {instance: lane for lane, group in enumerate(groups) for instance in group}
    for view in table.census:
        if view.id not in table.snapshot.in_flight:
            where = {of.get(home) for home in view.homes}
            if len(where) > 1 or None in where:
                table.preempt(view)


def reject_too_long(table: Worktable, groups: Sequence[Group]) -> tuple[Rejection, ...]:
    """Waiting requests that no lane could ever hold."""
    blocks = min(sum(table.capacity[instance] for instance in group) for group in groups)
    size = table.snapshot.block_size
    return tuple(
        Rejection(
            view.id,
            f"it needs up to {view.peak} KV slots, and a group of this policy has {blocks * size}; "
            "lower max_tokens, shorten the prompt, or use a policy that lets groups grow",
        )
        for view in table.snapshot.waiting
        if not view.kv
        and table.blocks(view.peak) > blocks
        and view.id not in table.snapshot.in_flight
    )


def _decodes(view: RequestView) -> bool:
    return view.uncomputed == 1
