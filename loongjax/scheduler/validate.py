"""The rules that every plan keeps. Whoever made it, a plan that breaks one is not run.

Owns the meaning of a plan: what may stand in it, given a snapshot. Owns no books: blocks
are counted the way `BlockAllocator` gives them out, so that a valid plan is never refused
there. One thing is not in a snapshot: how a request's tokens lie in its blocks, if those are
larger than a token. So a move counts as many blocks as it may need at most: where KV without
holes moves, one too many at most. Pure Python; O(rows + shares) a plan, and a glance at every
request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from typing import NoReturn

from loongjax.errors import PlanError
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    InstanceId,
    InstanceView,
    MigrateStep,
    Move,
    Placement,
    Plan,
    PrefillStep,
    RequestId,
    RequestView,
    Share,
    Snapshot,
    Step,
    step_requests,
)


def validate(snapshot: Snapshot, plan: Plan) -> None:
    """Checks a plan against the snapshot that it was made from.

    Raises:
      PlanError: It names the step, what is wrong with it, and what would mend it.
    """
    books = _Books(snapshot, plan)
    gone = _check_preempt(books, plan)
    _check_reject(books, plan)
    gone.update(rejection.request for rejection in plan.reject)
    _check_seqs(snapshot, plan.steps)
    _check_groups(books, plan.steps)
    _check_ahead(books, plan)
    _check_requests(books, plan.steps, gone)
    for step in plan.steps:
        match step:
            case PrefillStep():
                _check_prefill(books, step)
            case DecodeStep():
                _check_decode(books, step)
            case MigrateStep():
                _check_migrate(books, step)
    _check_capacity(books, plan)


@dataclass(slots=True)
class _Books:
    """The snapshot by id: of its requests, those that the plan names."""

    snapshot: Snapshot
    plan: InitVar[Plan]
    waiting: Mapping[RequestId, RequestView] = field(init=False)
    running: Mapping[RequestId, RequestView] = field(init=False)
    instances: Mapping[InstanceId, InstanceView] = field(init=False)

    def __post_init__(self, plan: Plan) -> None:
        named = {name for step in plan.steps for name in step_requests(step)}
        named.update(plan.preempt, [rejection.request for rejection in plan.reject])
        for step in plan.steps:
            if isinstance(step, PrefillStep):
                named.update([placement.request for placement in step.keep])
        self.waiting = {view.id: view for view in self.snapshot.waiting if view.id in named}
        self.running = {view.id: view for view in self.snapshot.running if view.id in named}
        self.instances = {view.id: view for view in self.snapshot.instances}

    def get(self, request: RequestId) -> RequestView | None:
        return self.waiting.get(request) or self.running.get(request)

    def held(self, view: RequestView) -> dict[InstanceId, int]:
        """Blocks that a request holds, by instance."""
        slots = Counter(dict(view.kv))
        slots.update(dict(view.holes))
        if view.tail is not None:
            slots[view.tail.instance] += view.tail.tokens
        return {instance: n // self.snapshot.block_size for instance, n in slots.items()}

    def freed(self, view: RequestView) -> Counter[InstanceId]:
        """Blocks that are free when a request alone drops its KV, by instance."""
        shared = {instance: slots // self.snapshot.block_size for instance, slots in view.shared}
        return Counter(self.held(view)) - Counter(shared)


def blocks_for(tokens: int, block_size: int) -> int:
    """Whole blocks that hold this many tokens."""
    return -(-tokens // block_size)


# ---- preempt and reject -----------------------------------------------------------------


def _check_preempt(books: _Books, plan: Plan) -> set[RequestId]:
    seen: set[RequestId] = set()
    for name in plan.preempt:
        view = books.get(name)
        if view is None:
            raise PlanError(f"preempt: there is no request {name!r}. Leave it out.")
        if name in seen:
            raise PlanError(f"preempt: request {name!r} appears twice. Name it once.")
        if name in books.snapshot.in_flight:
            raise PlanError(
                f"preempt: a step in flight works on request {name!r}. Wait until it has ended."
            )
        if not view.kv:
            raise PlanError(f"preempt: request {name!r} has no KV to give up. Leave it out.")
        seen.add(name)
    return seen


def _check_reject(books: _Books, plan: Plan) -> None:
    seen: set[RequestId] = set()
    for name, _ in plan.reject:
        view = books.waiting.get(name)
        if view is None:
            raise PlanError(f"reject: request {name!r} does not wait. Leave it out.")
        if name in seen:
            raise PlanError(f"reject: request {name!r} appears twice. Name it once.")
        if view.kv or name in books.snapshot.in_flight:
            raise PlanError(
                f"reject: request {name!r} was begun ({view.computed} tokens have KV). Preempt "
                "it first, and reject it in a later plan."
            )
        seen.add(name)


# ---- rules of every step ----------------------------------------------------------------


def _check_seqs(snapshot: Snapshot, steps: tuple[Step, ...]) -> None:
    for expected, step in enumerate(steps, snapshot.next_seq):
        if step.seq != expected:
            _refuse(step, f"its seq should be {expected}. Number steps from Snapshot.next_seq on")


def _check_groups(books: _Books, steps: tuple[Step, ...]) -> None:
    users: dict[InstanceId, Step] = {}
    for step in steps:
        if not books.snapshot.topology.contains(step.group):
            _refuse(
                step,
                f"group {step.group} does not exist; groups ascend, and this topology has degrees "
                f"{books.snapshot.topology.degrees}. Choose one with Topology.smallest_cover",
            )
        for instance in step.group:
            if instance in users:
                _refuse(
                    step,
                    f"group {step.group} shares instance {instance} with step "
                    f"{users[instance].seq} of this plan. Groups of one plan must be disjoint",
                )
            busy_seq = books.instances[instance].busy_seq
            if busy_seq is not None:
                _refuse(
                    step,
                    f"instance {instance} of group {step.group} is busy with step {busy_seq}. "
                    "Wait until that has ended",
                )
            users[instance] = step


def _check_ahead(books: _Books, plan: Plan) -> None:
    for group in plan.ahead:
        if not books.snapshot.topology.contains(group):
            raise PlanError(
                f"ahead: group {group} does not exist; this topology has degrees "
                f"{books.snapshot.topology.degrees}. Name groups of decode steps."
            )


def _check_requests(books: _Books, steps: tuple[Step, ...], gone: set[RequestId]) -> None:
    seen: dict[RequestId, Step] = {}
    for step in steps:
        names, decodes = step_requests(step), isinstance(step, DecodeStep)
        for name in names:
            if books.get(name) is None:
                _refuse(step, f"there is no request {name!r}. Leave it out")
            if name in seen:
                _refuse(
                    step, f"request {name!r} is in step {seen[name].seq} too. Plan it once a plan"
                )
            if name in gone:
                _refuse(
                    step, f"request {name!r} is preempted or rejected in this plan. Do one of both"
                )
            if name in books.snapshot.in_flight:
                _refuse(step, f"a step in flight works on request {name!r}. Wait until it ended")
            # KV of anybody may move, and whoever decodes may be carried along by a prefill step,
            # as a chunk of one token
            if decodes and name not in books.running:
                _refuse(step, f"request {name!r} does not run. Plan a step of the other kind")
            seen[name] = step
        if not names:
            _refuse(step, "it works on no request. Leave it out")


# ---- prefill ----------------------------------------------------------------------------


def _check_prefill(books: _Books, step: PrefillStep) -> None:
    names = tuple(placement.request for placement in step.keep)
    if names != step_requests(step):
        _refuse(
            step,
            f"chunks are of {step_requests(step)}, but placements of {names}. Give one placement "
            "for each chunk, in the same order",
        )
    for chunk, placement in zip(step.chunks, step.keep, strict=True):
        view = books.get(chunk.request)
        assert view is not None  # see `_check_requests`
        _check_chunk(step, chunk, view)
        _check_placement(step, chunk, placement)
        _check_homes(step, view)
    _check_size(books.snapshot, step)


def _check_chunk(step: PrefillStep, chunk: Chunk, view: RequestView) -> None:
    end = chunk.start + chunk.length
    if chunk.start != view.computed:
        _refuse(
            step,
            f"the chunk of request {view.id!r} starts at token {chunk.start}, but its KV has "
            f"{view.computed} tokens. Start it there",
        )
    if chunk.length < 1 or end > view.length:
        _refuse(
            step,
            f"the chunk of request {view.id!r} has {chunk.length} tokens; {view.uncomputed} are "
            "left to compute. Take between 1 and those",
        )
    if chunk.last != (end == view.length):
        _refuse(
            step,
            f"the chunk of request {view.id!r} ends at token {end} of {view.length}, but says "
            f"last={chunk.last}. Set last={not chunk.last}",
        )


def _check_placement(step: PrefillStep, chunk: Chunk, placement: Placement) -> None:
    homes = [share.instance for share in placement.shares]
    if len(set(homes)) != len(homes):
        _refuse(
            step,
            f"the placement of request {chunk.request!r} names an instance twice: {homes}. Give "
            "one share for each instance",
        )
    for instance, tokens in placement.shares:
        if tokens < 1:
            _refuse(
                step,
                f"the placement of request {chunk.request!r} keeps {tokens} tokens on instance "
                f"{instance}. Leave empty shares out",
            )
        if instance not in step.group:
            _refuse(
                step,
                f"group {step.group} lacks instance {instance}, which is to keep {tokens} tokens "
                f"of request {chunk.request!r}. Add {instance} to the group, or keep them in it",
            )
    kept = sum(share.tokens for share in placement.shares)
    if kept != chunk.length:
        _refuse(
            step,
            f"the placement of request {chunk.request!r} keeps {kept} of {chunk.length} tokens. "
            "Keep every token once",
        )


def _check_size(snapshot: Snapshot, step: PrefillStep) -> None:
    degree = len(step.group)
    tokens = sum(blocks_for(chunk.length, degree) for chunk in step.chunks)
    if tokens > snapshot.max_chunk_tokens:
        _refuse(
            step,
            f"each rank gets {tokens} tokens (every chunk padded to a multiple of {degree}); the "
            f"limit is {snapshot.max_chunk_tokens}. Take fewer tokens or a larger group",
        )
    if len(step.chunks) > snapshot.max_rows * degree:
        _refuse(
            step,
            f"{len(step.chunks)} chunks exceed {snapshot.max_rows * degree} ({snapshot.max_rows} "
            f"for each of {degree} ranks). Take fewer chunks or a larger group",
        )


# ---- decode -----------------------------------------------------------------------------


def _check_decode(books: _Books, step: DecodeStep) -> None:
    group = frozenset(step.group)
    for row in step.rows:
        name, master, home = row
        if master not in group or home not in group:
            _refuse_row(step, row)
        view = books.running[name]
        for share in view.kv:
            if share[0] not in group:
                _check_homes(step, view)
    rows = Counter([row[1] for row in step.rows])
    for master, count in rows.items():
        if count > books.snapshot.max_rows:
            _refuse(
                step,
                f"instance {master} is master of {count} rows; the limit is "
                f"{books.snapshot.max_rows}. Spread masters over the group, or take fewer rows",
            )


def _refuse_row(step: DecodeStep, row: DecodeRow) -> None:
    for role, instance in (("master", row.master), ("home", row.home)):
        if instance not in step.group:
            _refuse(
                step,
                f"group {step.group} lacks instance {instance}, the {role} of request "
                f"{row.request!r}. Add {instance} to the group, or choose another {role}",
            )


def _check_homes(step: Step, view: RequestView) -> None:
    for instance, tokens in view.kv:
        if instance not in step.group:
            _refuse(
                step,
                f"group {step.group} lacks instance {instance}, which holds {tokens} KV tokens of "
                f"request {view.id!r}. Add {instance} to the group",
            )


# ---- migrate ----------------------------------------------------------------------------


def _check_migrate(books: _Books, step: MigrateStep) -> None:
    targets = {(move.request, move.target) for move in step.moves}
    left: dict[tuple[RequestId, InstanceId], int] = {}
    for move in step.moves:
        for role, instance in (("source", move.source), ("target", move.target)):
            if instance not in step.group:
                _refuse(
                    step,
                    f"group {step.group} lacks instance {instance}, the {role} of a move of "
                    f"request {move.request!r}. Add {instance} to the group",
                )
        if (move.request, move.source) in targets:
            _refuse(
                step,
                f"KV of request {move.request!r} moves both to instance {move.source} and away "
                "from it. Move it straight to where it shall be",
            )
        place = (move.request, move.source)
        view = books.get(move.request)
        held = left[place] if place in left else dict(view.kv if view else ()).get(move.source, 0)
        if not 1 <= move.tokens <= held:
            _refuse(
                step,
                f"{move.tokens} KV tokens of request {move.request!r} are to leave instance "
                f"{move.source}, which holds {held} then. Move at least 1, and what is there",
            )
        left[place] = held - move.tokens


# ---- capacity ---------------------------------------------------------------------------


def _check_capacity(books: _Books, plan: Plan) -> None:
    """Blocks wanted on each instance, against those that are free or given back."""
    size = books.snapshot.block_size
    freed: Counter[InstanceId] = Counter()
    for name in plan.preempt:
        if view := books.get(name):
            freed.update(books.freed(view))
    for step in plan.steps:
        wanted: Counter[InstanceId] = Counter()
        for instance, blocks in _wanted(books, step):
            wanted[instance] += blocks
        for instance in step.group:
            free = books.instances[instance].free_slots // size + freed[instance]
            if wanted[instance] > free:
                _refuse(
                    step,
                    f"instance {instance} would need {wanted[instance] * size} slots in new "
                    f"blocks of {size}, and has {free * size}. Keep tokens elsewhere in the group, "
                    "or preempt a request with KV there",
                )


def _wanted(books: _Books, step: Step) -> Iterator[tuple[InstanceId, int]]:
    """Blocks that a step takes; an instance may come up often."""
    if isinstance(step, MigrateStep):
        before: Counter[tuple[RequestId, InstanceId]] = Counter()
        for move in step.moves:
            place = (move.request, move.source)
            yield move.target, _moved_blocks(books, move, before[place])
            before[place] += move.tokens
        return
    if isinstance(step, DecodeStep):
        for name, _, home in step.rows:
            tail = books.running[name].tail
            if tail is None or tail[0] != home:
                yield home, 1
        return
    for placement in step.keep:
        view = books.get(placement.request)
        yield from new_blocks(
            placement.shares, view.tail if view else None, books.snapshot.block_size
        )


def _moved_blocks(books: _Books, move: Move, before: int) -> int:
    """Blocks that a move takes at most; `before` are the tokens that left its source earlier.

    Its tokens take no more blocks than they lay in. Of all blocks at the source, those are not
    among them that lie wholly in what was moved before, or wholly in what stays.
    """
    view = books.get(move.request)
    if view is None:
        return 0
    size = books.snapshot.block_size
    tail = view.tail.tokens if view.tail and view.tail.instance == move.source else 0
    stays = dict(view.kv)[move.source] - before - move.tokens
    touched = books.held(view)[move.source] - (before + tail) // size - stays // size
    return min(move.tokens, touched)


def new_blocks(
    shares: tuple[Share, ...], tail: Share | None, block_size: int
) -> list[tuple[InstanceId, int]]:
    """Blocks that a request's new tokens take on each instance.

    Only the first share can fill the request's partly filled block, if that lies there.
    """
    found = []
    for place, (instance, tokens) in enumerate(shares):
        at_tail = place == 0 and tail is not None and tail.instance == instance
        room = tail.tokens if at_tail and tail is not None else 0
        found.append((instance, blocks_for(max(0, tokens - room), block_size)))
    return found


def _refuse(step: Step, problem: str) -> NoReturn:
    raise PlanError(f"step {step.seq} ({type(step).__name__}): {problem}.")
