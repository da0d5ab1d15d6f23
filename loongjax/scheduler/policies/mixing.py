"""Prototype: steps that carry decodes and parts of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.plan import (
    Chunk,
    Group,
    InstanceId,
    MigrateStep,
    Move,
    Placement,
    PrefillStep,
    RequestView,
    Share,
)
from loongjax.scheduler.dispatch import Prompt, memory_allows
from loongjax.scheduler.policies.worktable import Worktable
from loongjax.scheduler.scaling import tokens_in_time

_LOOK = 64


@dataclass(kw_only=True, slots=True, eq=False)
class Draft:
    group: Group
    members: frozenset[InstanceId]
    riders: list[tuple[RequestView, InstanceId]]
    works: list[ChunkWork]
    budget: float
    plain_s: float
    chunks: list[tuple[RequestView, int, tuple[Share, ...]]] = field(default_factory=list)


class Mixer:
    def __init__(self, table: Worktable, setting, now: float) -> None:
        self._table = table
        self._set = setting
        self._cost = setting.cost
        self._now = now
        self._drafts: dict[InstanceId, Draft] = {}
        self.steps: list[PrefillStep | MigrateStep] = []
        self._blocked = False
        self._until: dict[InstanceId, float] = {}
        self._moved: set[str] = set()

    # ---- order

    @cached_property
    def _line(self) -> list[RequestView]:
        in_flight = self._table.snapshot.in_flight
        line = [v for v in self._table.line if v.id not in in_flight]
        if len(line) > 1:
            line.sort(key=self._urgency)
        return line

    def _urgency(self, view: RequestView):
        largest = self._table.snapshot.topology.degrees[-1]
        s = self._set
        alone = self._cost.prefill(largest, [ChunkWork(view.length, 0)])
        left = max(1, view.uncomputed)
        rest = alone if not view.computed else self._cost.prefill(largest, [ChunkWork(left, view.computed)])
        return (-view.priority, view.arrival + max(s.slack_floor_s, s.slack_factor * alone) - rest)

    def anyone_waits(self) -> bool:
        table = self._table
        busy = table.snapshot.in_flight
        return bool(table.preempted) or any(
            v.id not in table.placed for v in self._line
        )

    @cached_property
    def _overdue(self) -> bool:
        return bool(self._line) and self._urgency(self._line[0])[1] < self._now

    # ---- facts

    def _alone1(self, tokens: int) -> float:
        return self._cost.prefill(1, [ChunkWork(tokens, 0)])

    def _is_long(self, view: RequestView) -> bool:
        return len(view.homes) > 1 or (not view.kv and self._alone1(view.length) > self._set.chunk_s)

    @cached_property
    def _in_time(self) -> int:
        return tokens_in_time(self._set.decode_s, self._table.snapshot.max_chunk_tokens, self._cost)

    @cached_property
    def _ends(self) -> dict[InstanceId, float]:
        """When busy instances are idle, about [s from now]."""
        found: dict[InstanceId, float] = {}
        for step, launched in self._table.snapshot.flights:
            group = step.group
            begin = max([launched - self._now, *(found.get(i, -math.inf) for i in group)])
            k = len(group)
            if isinstance(step, PrefillStep):
                seconds = self._cost.prefill(k, [ChunkWork(c.length, c.start) for c in step.chunks])
            elif isinstance(step, MigrateStep):
                seconds = self._cost.migrate(sum(m.tokens for m in step.moves))
            else:
                seconds = self._cost.decode(k, DecodeWork(len(step.rows), self._kv_on(group), k))
            for i in group:
                found[i] = begin + seconds
        return found

    def _kv_on(self, group: Group) -> int:
        t = self._table
        return sum(t.capacity[i] - t.free[i] for i in group) * t.snapshot.block_size

    @cached_property
    def _slack(self) -> dict[InstanceId, float]:
        """By idle instance: when somebody there should have its next token [s from now]."""
        found: dict[InstanceId, float] = {}
        for view in self._table.near:
            first = self._now if view.first_token is None else view.first_token
            slack = first + self._set.decode_s * max(1, view.generated) - self._now
            for share in view.kv:
                if slack < found.get(share[0], math.inf):
                    found[share[0]] = slack
        return found

    @cached_property
    def _rows_on(self) -> dict[InstanceId, list[RequestView]]:
        found: dict[InstanceId, list[RequestView]] = {}
        for view in self._table.near:
            for share in view.kv:
                found.setdefault(share[0], []).append(view)
        return found

    # ---- seating

    def seat(self) -> None:
        table = self._table
        line = self._line[:_LOOK]
        if not line:
            return
        self._begun_longs = [v for v in line if v.kv and len(v.homes) >= 1 and v.uncomputed > 1]
        self._gather()
        lane = self._lane
        long_draft = None
        if lane and any(self._takes_lane(v) for v in line):
            if lane <= table.idle:
                long_draft = self._open(tuple(sorted(lane)))
            else:
                self._meet(lane)
        closed = False
        for view in line:
            if view.kv:
                if self._takes_lane(view):
                    if long_draft is not None:
                        self._add(long_draft, view, sorted(lane))
                    continue
                draft = self._drafts.get(next(iter(view.homes)))
                if draft is None and view.homes <= table.idle:
                    draft = self._open(tuple(sorted(view.homes)))
                if draft is not None and view.homes <= draft.members:
                    self._add(draft, view, sorted(view.homes))
                continue
            if closed:
                continue
            if not self._has_memory(view):
                closed = True
            elif not self._is_long(view):
                self._begin_short(view)
            elif self._goes_alone(view):
                self._begin_short(view, alone=True)
            elif long_draft is not None and self._room_on(lane) >= table.blocks(table.granted(view)):
                self._add(long_draft, view, sorted(lane))
        self._emit()

    def _has_memory(self, view: RequestView) -> bool:
        table = self._table
        growth = view.max_tokens - view.generated - 1
        if table.headroom is not None:
            growth = min(growth, table.headroom)
        prompt = Prompt(view.length, growth, table.blocks(view.length + growth))
        if prompt.blocks > sum(table.free):
            return False
        return table.has_plenty(prompt.blocks) or memory_allows([prompt], table.pool(table.everything)) == 1

    # ---- gathering

    def _gather(self) -> None:
        """Moves decodes away from where prompts take long."""
        table = self._table
        region = self._lane
        if not region or not any(self._takes_lane(v) for v in (*self._line, *table.begun)):
            return
        others = table.everything - region
        if not others:
            return
        movers = [v for v in table.near if not v.homes.isdisjoint(region) and v.homes <= table.idle]
        if not movers:
            return
        s = self._set
        moves, group, used = [], set(), None
        for view in sorted(movers, key=lambda v: v.computed):
            if view.computed * 2 > self._in_time or view.shared:
                continue
            target = self._target(view, others)
            if target is None:
                continue
            if target not in table.idle and target not in group:
                wait = self._ends.get(target, 0.0)
                if wait <= s.decode_s:
                    self._meet(view.homes | {target})
                continue
            if used is not None and target != used:
                continue
            used = target
            group |= view.homes | {target}
            for share in view.kv:
                if share.instance != target:
                    moves.append(Move(view.id, share.instance, target, share.tokens))
            table.free[target] -= sum(table.held_blocks(view, i) for i in view.homes if i != target)
            self._moved.add(view.id)
        if not moves:
            return
        cover = table.snapshot.topology.smallest_cover(frozenset(group), frozenset(table.idle))
        if cover is None:
            return
        self.steps.append(MigrateStep(seq=table.snapshot.next_seq, group=cover, moves=tuple(moves)))
        table.claim(cover)
        table.near = [v for v in table.near if v.id not in self._moved]

    def _target(self, view: RequestView, others: frozenset[InstanceId]) -> InstanceId | None:
        """Where a decode may move: rows first, if a step there is in time."""
        table = self._table
        best = None
        for i in others:
            blocks = sum(table.held_blocks(view, h) for h in view.homes if h != i)
            if table.spare(i) < blocks + 4:
                continue
            rows = self._tenants_rows(i)
            kv = (table.capacity[i] - table.free[i]) * table.snapshot.block_size + view.computed
            time = self._cost.decode(1, DecodeWork(rows + 1, kv, 1, None))
            if time > 0.9 * self._set.decode_s:
                continue
            key = (i in table.idle, rows)
            if best is None or key > best[0]:
                best = (key, i)
        return None if best is None else best[1]

    # ---- drafts

    def _meet(self, homes: frozenset[InstanceId]) -> None:
        """Idle ones of these do nothing that lasts longer than until the others are idle."""
        idle = self._table.idle
        wait = max((self._ends.get(i, 0.0) for i in homes if i not in idle), default=0.0)
        for i in homes:
            if i not in self._drafts and i not in self._until:
                self._until[i] = max(wait, 0.0)

    def _open(self, group: Group) -> Draft | None:
        table = self._table
        cover = table.cover(frozenset(group), frozenset(table.idle))
        if cover is None:
            return None
        group = cover
        members = frozenset(group)
        k = len(group)
        rows, blockers = [], []
        seen = set()
        for i in group:
            for view in self._rows_on.get(i, ()):
                if view.id in seen or view.id in table.preempted:
                    continue
                seen.add(view.id)
                (rows if view.homes <= members else blockers).append(view)
        budget = self._set.chunk_s
        slack = min((self._slack[i] for i in group if i in self._slack), default=None)
        if slack is not None:
            budget = min(budget, slack)
        draft = Draft(group=group, members=members, riders=[], works=[], budget=budget, plain_s=0.0)
        if len(rows) > table.snapshot.max_rows * k:
            return None
        kv = longest = 0
        load = dict.fromkeys(group, 0)
        free = {i: table.free[i] for i in group}
        for view in rows:
            if view.tail is not None:
                home = view.tail[0]
            else:
                home = max(group, key=lambda i: (i in view.homes, free[i]) if free[i] else (False, -1))
                if not free[home]:
                    continue
                free[home] -= 1
            draft.riders.append((view, home))
            fullest = max(s[1] for s in view.kv) * k
            draft.works.append(ChunkWork(1, max(view.computed, fullest)))
            for i, n in view.kv:
                load[i] += n
            longest = max(longest, fullest)
        if draft.riders:
            draft.plain_s = self._cost.decode(
                k, DecodeWork(len(draft.riders), max(load.values()) * k, min(k, len(draft.riders)), longest)
            )
        if draft.riders and self._overdue:
            draft.budget = max(draft.budget, min(self._set.chunk_s, 2.0 * draft.plain_s))
        until = min((self._until[i] for i in group if i in self._until), default=math.inf)
        draft.budget = min(draft.budget, until)
        for i in group:
            taken = table.free[i] - free[i]
            if taken:
                table.free[i] -= taken
        for i in group:
            self._drafts[i] = draft
        table.claim(group)
        return draft

    def _time(self, draft: Draft, *more: ChunkWork) -> float:
        works = [*draft.works, *more]
        return self._cost.prefill(len(draft.group), works) if works else 0.0

    def _work(self, draft: Draft, view: RequestView, tokens: int) -> ChunkWork:
        k = len(draft.group)
        fullest = max((s[1] for s in view.kv), default=0) * k
        return ChunkWork(tokens, max(view.computed, fullest))

    def _fit(self, draft: Draft, view: RequestView) -> int:
        """Tokens of a prompt that fit into a step."""
        table = self._table
        k = len(draft.group)
        room = table.snapshot.max_chunk_tokens * k - sum(-(-w.tokens // k) * k for w in draft.works)
        most = min(max(1, view.uncomputed), room)
        if most < 1 or len(draft.works) >= table.snapshot.max_rows * k:
            return 0
        budget = draft.budget
        if self._time(draft, self._work(draft, view, most)) <= budget:
            return most
        one = self._time(draft, self._work(draft, view, 1))
        if one >= budget:
            return 0
        low, high = 1, most
        while high - low > max(16, low // 32):
            mid = (low + high) // 2
            if self._time(draft, self._work(draft, view, mid)) <= budget:
                low = mid
            else:
                high = mid
        # worth it?
        fixed = one - (self._time(draft) if draft.chunks else draft.plain_s)
        useful = self._time(draft, self._work(draft, view, low)) - one
        if useful < 0.05 * budget:
            return 0
        if draft.riders or draft.chunks or draft.budget < self._set.chunk_s:
            if useful < self._set.waste * fixed:
                return 0
        return low

    def _add(self, draft: Draft, view: RequestView, homes: Sequence[InstanceId]) -> int:
        table = self._table
        tokens = self._fit(draft, view)
        size = table.snapshot.block_size
        tail = 0 if view.tail is None else view.tail.tokens
        room = tail + sum(table.free[i] for i in homes) * size
        if room < min(tokens, view.uncomputed) and room < tokens:
            homes = list(draft.group)
            room = tail + sum(table.free[i] for i in homes) * size
        tokens = min(tokens, room)
        if tokens < 1:
            return 0
        shares, taken = self._spread(view, homes, tokens)
        draft.chunks.append((view, tokens, shares))
        draft.works.append(self._work(draft, view, tokens))
        kv = dict(view.kv)
        for i, kept in shares:
            kv[i] = kv.get(i, 0) + kept
        after = replace(
            view, computed=view.computed + tokens, kv=tuple(Share(i, kv[i]) for i in sorted(kv))
        )
        table.place(after, taken.items(), new=not view.kv)
        return tokens

    def _spread(self, view, homes, tokens):
        """Evenly over its homes, as many tokens of it on each as can be."""
        table = self._table
        size = table.snapshot.block_size
        tail = 0 if view.tail is None else view.tail.tokens
        blocks = -(-max(0, tokens - tail) // size)
        held = dict(view.kv)
        # levels: fill those that hold least
        total = sum(held.get(i, 0) for i in homes) + blocks * size
        level = total / len(homes)
        taken: dict[InstanceId, int] = {}
        left = blocks
        order = sorted(homes, key=lambda i: held.get(i, 0))
        for n, i in enumerate(order):
            want = max(0, round((level - held.get(i, 0)) / size))
            got = min(want, table.free[i], left)
            taken[i] = got
            left -= got
        for i in sorted(homes, key=lambda i: -table.free[i]):
            if not left:
                break
            more = min(left, table.free[i] - taken[i])
            taken[i] += more
            left -= more
        taken = {i: n for i, n in taken.items() if n}
        kept = {i: n * size for i, n in taken.items()}
        first = None
        if view.tail is not None:
            first = view.tail[0]
            kept[first] = kept.get(first, 0) + view.tail[1]
        order2 = sorted(kept, key=lambda i: (i != first, table.free[i] - taken.get(i, 0), i))
        shares = [Share(i, kept[i]) for i in order2]
        surplus = sum(kept.values()) - tokens
        shares[-1] = Share(shares[-1].instance, shares[-1].tokens - surplus)
        return tuple(s for s in shares if s.tokens), taken

    # ---- new prompts

    def _goes_alone(self, view: RequestView) -> bool:
        """Whether a long prompt may be computed on one instance outside of the lane."""
        table = self._table
        if view.length * 2 > self._in_time or not self._lane_is_busy:
            return False
        if any(v.kv and len(v.homes) == 1 and not (v.homes & self._lane) for v in table.begun):
            return False
        work = self._alone1(view.length)
        slack = self._urgency(view)[1] - self._now
        return 3.0 * work < slack

    @cached_property
    def _lane_is_busy(self) -> bool:
        return any(self._takes_lane(v) for v in self._table.begun)

    def _begin_short(self, view: RequestView, alone: bool = False) -> None:
        table = self._table
        need = table.blocks(view.length) + 1
        best = None
        seen = set()
        for draft in self._drafts.values():
            if id(draft) in seen or len(draft.group) > 1:
                continue
            seen.add(id(draft))
            home = max(draft.group, key=lambda i: table.free[i])
            if table.free[home] < need:
                continue
            left = draft.budget - self._time(draft)
            if left > 0.0 and (best is None or left > best[0]):
                best = (left, draft, home)
        longs = self._lane
        if alone:
            need = 2 * need
            best = None
        idle = [i for i in table.idle - (longs if alone else frozenset()) if table.free[i] >= need and (i not in self._until or self._until[i] > self._set.decode_s)]
        if idle:
            i = min(idle, key=lambda i: (i in longs, len(self._rows_on.get(i, ())), -table.free[i]))
            draft = self._open((i,))
            if draft is not None and self._add(draft, view, [i]):
                return
        if alone:
            return
        if best is not None:
            if self._add(best[1], view, [best[2]]):
                return
        for draft in {id(d): d for d in self._drafts.values()}.values():
            home = max(draft.group, key=lambda i: table.free[i])
            if len(draft.group) > 1 and table.free[home] >= need and self._add(draft, view, [home]):
                return

    @cached_property
    def _region(self) -> frozenset[InstanceId]:
        """Instances of prompts that take long and are begun."""
        found: set[InstanceId] = set()
        for view in self._table.begun:
            if view.uncomputed > 1 and len(view.kv) > 1:
                found |= view.homes
        return frozenset(found)

    @cached_property
    def _decoders(self) -> int:
        """Instances that all decodes need, put together."""
        table = self._table
        views = table.snapshot.running
        if not views:
            return 1 if any(not self._is_long(v) for v in self._line[:_LOOK] if not v.kv) else 0
        everything = len(table.free)
        small = [v for v in views if v.computed * 2 <= self._in_time]
        if not small:
            return 1 if any(not self._is_long(v) for v in self._line[:_LOOK] if not v.kv) else 0
        rows, kv = len(small), sum(v.computed for v in small)
        for m in range(1, everything):
            n = -(-rows // m)
            if self._cost.decode(1, DecodeWork(n, kv // m, 1, max(v.computed for v in small))) <= self._set.share * self._set.decode_s:
                return m
        return everything - 1

    def _tenants_rows(self, i: InstanceId) -> int:
        return self._table.tenants(i).rows

    def _takes_lane(self, view: RequestView) -> bool:
        if not view.kv:
            return self._is_long(view)
        return not view.homes.isdisjoint(self._region)

    def _room_on(self, group: frozenset[InstanceId]) -> int:
        """Blocks of these that nobody who is begun will need."""
        table = self._table
        free = sum(table.free[i] for i in group)
        for view in table.census:
            if not view.homes.isdisjoint(group):
                free -= max(0, table.blocks(table.granted(view)) - table.blocks(view.computed))
        for view in table.placed.values():
            if not view.homes.isdisjoint(group):
                free -= max(0, table.blocks(table.granted(view)) - table.blocks(view.computed))
        return free

    def _wants(self, view: RequestView) -> tuple[int, int]:
        """Instances that a prompt needs, and those that it can use."""
        table = self._table
        everything, n = len(table.free), view.length
        blocks = table.blocks(table.granted(view))
        least = -(-blocks // max(table.capacity))
        if n <= self._in_time * everything:
            least = max(least, -(-n // self._in_time))
        work = self._alone1(n)
        want = 1
        for k in table.snapshot.topology.degrees:
            if self._cost.prefill(k, [ChunkWork(1, 0)]) * k <= 0.15 * work:
                want = max(want, k)
        return min(least, everything), want

    @cached_property
    def _lane(self) -> frozenset[InstanceId]:
        """Instances for prompts that take long."""
        table = self._table
        region = self._region
        longs = [v for v in self._line[:_LOOK] if self._takes_lane(v)]
        if not longs and not region:
            return region
        everything = len(table.free)
        kept = max(1, self._decoders) if everything > 1 else 0
        size = len(region)
        for view in longs:
            least, want = self._wants(view)
            size = max(size, least, min(want, everything - kept))
        order = sorted(table.everything, key=lambda i: (i not in region, self._tenants_rows(i), -table.free[i], i))
        topology = table.snapshot.topology
        size = next((d for d in topology.degrees if d >= size), topology.degrees[-1])
        group = tuple(sorted(order[:size]))
        if topology.contains(group):
            return frozenset(group)
        cover = topology.smallest_cover(region or frozenset(order[:1]), None, size)
        return frozenset(cover or ())

    # ---- steps

    def _emit(self) -> None:
        table = self._table
        seq = table.snapshot.next_seq
        gone = set()
        for draft in {id(d): d for d in self._drafts.values()}.values():
            if not draft.chunks:
                for view, home in draft.riders:
                    if view.tail is None:
                        table.free[home] += 1
                table.idle.update(draft.group)
                continue
            chunks, keep = [], []
            for view, home in draft.riders:
                chunks.append(Chunk(request=view.id, start=view.computed, length=1, last=True))
                keep.append(Placement(request=view.id, shares=(Share(home, 1),)))
                gone.add(view.id)
            for view, tokens, shares in draft.chunks:
                end = view.computed + tokens
                chunks.append(Chunk(request=view.id, start=view.computed, length=tokens, last=end == view.length))
                keep.append(Placement(request=view.id, shares=shares))
            self.steps.append(
                PrefillStep(seq=seq + len(self.steps), group=draft.group, chunks=tuple(chunks), keep=tuple(keep))
            )
        # those who wait for others do not begin what lasts longer
        for i, until in self._until.items():
            if i in table.idle and until < 0.5 * self._set.decode_s:
                table.idle.discard(i)
        table.near = [v for v in table.near if v.id not in gone]
