"""Slots of the KV pool: who holds which, and nothing else.

Owns every slot of every instance. The scheduler counts tokens; only this module knows
slots, and engine and simulator share it. Host code: imports no jax.

Promises: a block belongs to exactly the requests that hold it, or is free; `apply` does
all of a step or nothing; for steps that compute it costs O(blocks changed), never O(context),
and for a move O(blocks of that request on its two instances); the same calls give the same
slots. `check_integrity` proves the first.
Not here: which instance a token goes to (the scheduler decides), when a request's slots may
be freed (the engine knows which steps are in flight), and what the refusal of a step says
(`loongjax.kvcache.refusals`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Int32

from loongjax.errors import ConfigError, PlanError
from loongjax.kvcache.blocks import Blocks
from loongjax.kvcache.holding import NOWHERE, Holding, Whereabouts
from loongjax.kvcache.integrity import check_books
from loongjax.kvcache.messages import (
    DecodeSlots,
    MigrateSlots,
    MoveSlots,
    PrefillSlots,
    ShareSlots,
    SlotPlan,
)
from loongjax.kvcache.moving import Cut, cut_moves
from loongjax.kvcache.refusals import check_chunk, check_free, check_instance, refusal
from loongjax.kvcache.tables import ENTRIES_PER_BLOCK
from loongjax.plan import (
    DecodeStep,
    InstanceId,
    MigrateStep,
    PrefillStep,
    RequestId,
    Share,
    Step,
)


class _Piece(NamedTuple):
    """One share of a chunk: `fill` tokens into the partly filled block, the rest into new."""

    request: RequestId
    instance: InstanceId
    tokens: int
    fill: int


class BlockAllocator:
    """The books of the whole pool. Not thread-safe.

    Attributes:
      instances: How many instances there are.
      slots: Slots of each instance.
      block_size: Tokens per block.
      usable: Slots of each instance that lie in whole blocks; the rest is never used.
    """

    def __init__(self, *, instances: int, slots: int, block_size: int) -> None:
        """An empty pool.

        Raises:
          ConfigError: No instance, an empty block, or an instance smaller than a block.
        """
        if instances < 1 or block_size < 1 or slots < block_size:
            raise ConfigError(
                f"a KV pool of {instances} instances with {slots} slots each in blocks of "
                f"{block_size} holds nothing. All three must be at least 1, and slots at least "
                f"the block size: give the pool more slots or choose smaller blocks."
            )
        self.instances = instances
        self.slots = slots
        self.block_size = block_size
        self.usable = slots - slots % block_size
        self._blocks = [Blocks(slots // block_size) for _ in range(instances)]
        self._held: dict[RequestId, Holding] = {}

    # ---- what changes the books ------------------------------------------------------

    @overload
    def apply(self, step: PrefillStep) -> PrefillSlots: ...

    @overload
    def apply(self, step: DecodeStep) -> DecodeSlots: ...

    @overload
    def apply(self, step: MigrateStep) -> MigrateSlots: ...

    def apply(self, step: Step) -> SlotPlan:
        """Gives a step's new tokens their slots, or tokens that move their new ones.

        A new token goes into its request's newest block if that is partly filled, lies on the
        right instance and is not shared; otherwise into a new block. Tokens that move go into
        new blocks, as few as their positions allow; blocks that a step empties serve only
        later steps. From shared blocks they move as a copy: the other holders keep them.

        Raises:
          PlanError: An instance has too few free blocks, or the step contradicts the books.
            Nothing has changed then.
        """
        match step:
            case PrefillStep():
                return self._prefill(step)
            case MigrateStep():
                return self._migrate(step)
        return self._decode(step)

    def release(self, request: RequestId) -> None:
        """Gives up all KV of a request. One without KV is no error. O(its blocks)."""
        kv = self._held.pop(request, None)
        if kv is None:
            return
        self._leave_family(request, kv)
        for instance, run in kv.runs.items():
            self._blocks[instance].drop(run.entries[:, 0] // self.block_size)

    def fork(self, src: RequestId, dst: RequestId) -> None:
        """Lets `dst` hold the KV of `src` too, without a copy on the devices. O(its blocks).

        While both hold the newest block, neither writes into it: their next tokens start
        new blocks.

        Raises:
          PlanError: `src` has no KV, or `dst` has some, or `can_fork` says no.
        """
        kv = self._held.get(src)
        if kv is None or dst in self._held:
            raise PlanError(
                f"cannot fork {src!r} ({self.computed(src)} KV tokens) into {dst!r} "
                f"({self.computed(dst)} KV tokens): the first must have KV, the second none. "
                f"Compute {src!r} first, and fork into a new request."
            )
        if not self.can_fork(src):
            raise PlanError(
                f"cannot fork {src!r} ({kv.computed} KV tokens): block tables have room for "
                f"{ENTRIES_PER_BLOCK} entries for each block, and that would be more. Compute "
                f"{dst!r} by itself."
            )
        for instance, run in kv.runs.items():
            self._blocks[instance].share(run.entries[:, 0] // self.block_size)
        kv.family = kv.family or {src}
        kv.family.add(dst)
        self._held[dst] = kv.copy()
        self._recount_shared(kv)

    def can_fork(self, src: RequestId) -> bool:
        """Whether block tables have room for one more holder of all KV of `src`. O(all blocks).

        They do as long as holders and free blocks together are no more than their entries: a
        free block that is taken makes one entry, and one that is dropped takes one away.
        """
        kv = self._held.get(src)
        return kv is not None and all(
            self._blocks[instance].holders + self._blocks[instance].free + run.blocks
            <= ENTRIES_PER_BLOCK * self._blocks[instance].count
            for instance, run in kv.runs.items()
        )

    # ---- what they say ---------------------------------------------------------------

    def relatives(self, request: RequestId) -> frozenset[RequestId]:
        """Others that may share blocks with a request: what it does changes their views."""
        kv = self._held.get(request)
        family = frozenset() if kv is None or kv.family is None else frozenset(kv.family)
        return family - {request}

    def computed(self, request: RequestId) -> int:
        """KV tokens of a request; 0 if it is unknown."""
        kv = self._held.get(request)
        return 0 if kv is None else kv.computed

    def whereabouts(self, request: RequestId) -> Whereabouts:
        """Where the KV of a request lies."""
        kv = self._held.get(request)
        if kv is None:
            return NOWHERE
        last, room, shared = kv.last_instance, self._room(kv), kv.shared
        if shared is None:
            shared = self._count_shared(kv)
        tail = Share(last, room) if room else None
        # Nearly always: on one instance, without a hole.
        if len(kv.runs) == 1 and kv.runs[last].blocks * self.block_size == kv.computed + room:
            return Whereabouts(kv.computed, (Share(last, kv.computed),), tail, (), shared)
        shares, holes = [], []
        for instance, run in sorted(kv.runs.items()):
            shares.append(Share(instance, run.tokens))
            unused = run.blocks * self.block_size - run.tokens - (instance == last) * room
            if unused:
                holes.append(Share(instance, unused))
        return Whereabouts(kv.computed, tuple(shares), tail, tuple(holes), shared)

    def shares(self, request: RequestId) -> tuple[Share, ...]:
        """See `Whereabouts`."""
        return self.whereabouts(request).shares

    def free_slots(self, instance: InstanceId) -> int:
        """Slots in blocks that nobody holds."""
        return self._blocks[instance].free * self.block_size

    def used_slots(self, instance: InstanceId) -> int:
        """Slots in blocks that someone holds, filled or not."""
        return self.usable - self.free_slots(instance)

    def fits(self, step: DecodeStep) -> bool:
        """Whether its homes have room for the tokens of all rows, each named once. O(rows)."""
        if self._has_plenty(step):
            return True
        wanted = self._wanted_by(step).items()
        return all(blocks <= self._blocks[home].free for home, blocks in wanted)

    def check_integrity(self) -> None:
        """Proves the books. O(all blocks), for tests and idle moments.

        Raises:
          IntegrityError: With the sums that contradict each other.
        """
        check_books(self._blocks, self._held, self.block_size)

    # ---- families --------------------------------------------------------------------

    def _count_shared(self, kv: Holding) -> tuple[Share, ...]:
        counts = [
            (instance, self._blocks[instance].shared_of(run.entries[:, 0] // self.block_size))
            for instance, run in sorted(kv.runs.items())
        ]
        kv.shared = tuple(Share(i, n * self.block_size) for i, n in counts if n)
        return kv.shared

    def _recount_shared(self, kv: Holding) -> None:
        for name in kv.family or ():
            self._held[name].shared = None

    def _leave_family(self, request: RequestId, kv: Holding) -> None:
        if kv.family is not None:
            kv.family.remove(request)
            self._recount_shared(kv)

    # ---- decode ----------------------------------------------------------------------

    def _decode(self, step: DecodeStep) -> DecodeSlots:
        held = self._held
        if len({request for request, _, _ in step.rows}) != len(step.rows):
            raise refusal(step, "names a request twice. Give each request one row")
        if not self._has_plenty(step):
            for request, _, home in step.rows:
                check_instance(step, request, home, self.instances)
            needed = self._wanted_by(step)
            wanted = [needed[instance] for instance in range(self.instances)]
            check_free(step, wanted, self._blocks, self.block_size)
        slots: list[int] = []
        positions: list[int] = []
        for request, _, home in step.rows:
            kv = held.get(request)
            if kv is None:
                kv = held[request] = Holding()
            slot = kv.next_slot
            if kv.last_instance == home and self._room(kv):
                kv.runs[home].fill_last(1)
            else:
                slot = self._blocks[home].take_one() * self.block_size
                kv.run_on(home).add_token(slot, kv.computed)
                kv.last_instance = home
            slots.append(slot)
            positions.append(kv.computed)
            kv.next_slot = slot + 1
            kv.computed += 1
        return DecodeSlots(seq=step.seq, slots=tuple(slots), positions=tuple(positions))

    def _has_plenty(self, step: DecodeStep) -> bool:
        """Whether its homes have a new block for every row, so that nobody needs to count."""
        rows = len(step.rows)
        return all(
            0 <= home < self.instances and self._blocks[home].free >= rows
            for home in {row[2] for row in step.rows}
        )

    def _wanted_by(self, step: DecodeStep) -> Counter[InstanceId]:
        """New blocks that a decode step takes, by instance."""
        held = self._held
        return Counter(
            home
            for request, _, home in step.rows
            if (kv := held.get(request)) is None or kv.last_instance != home or not self._room(kv)
        )

    # ---- prefill ---------------------------------------------------------------------

    def _prefill(self, step: PrefillStep) -> PrefillSlots:
        pieces = list(self._pieces(step))
        wanted = [0] * self.instances
        for piece in pieces:
            wanted[piece.instance] += -(-(piece.tokens - piece.fill) // self.block_size)
        check_free(step, wanted, self._blocks, self.block_size)
        return PrefillSlots(seq=step.seq, shares=tuple(self._add_piece(p) for p in pieces))

    def _pieces(self, step: PrefillStep) -> Iterator[_Piece]:
        """The non-empty shares of a step, each chunk checked."""
        if len({chunk.request for chunk in step.chunks}) != len(step.chunks):
            raise refusal(step, "names a request twice. Give each request one chunk")
        if len(step.chunks) != len(step.keep):
            raise refusal(
                step,
                f"has {len(step.chunks)} chunks but {len(step.keep)} placements in `keep`. "
                f"Give one placement for each chunk",
            )
        for chunk, placement in zip(step.chunks, step.keep, strict=True):
            kv = self._held.get(chunk.request)
            computed = 0 if kv is None else kv.computed
            check_chunk(step, chunk, placement, computed=computed, instances=self.instances)
            room = self._room(kv)
            for instance, tokens in placement.shares:
                if tokens > 0:
                    at_tail = kv is not None and kv.last_instance == instance
                    fill = min(room, tokens) if at_tail else 0
                    yield _Piece(chunk.request, instance, tokens, fill)
                    room = 0

    def _add_piece(self, piece: _Piece) -> ShareSlots:
        kv = self._held.get(piece.request)
        if kv is None:
            kv = self._held[piece.request] = Holding()
        run, fill = kv.run_on(piece.instance), piece.fill
        parts: list[Int32[np.ndarray, "N 3"]] = []
        if fill:
            run.fill_last(fill)
            parts.append(np.array([[kv.next_slot, kv.computed, fill]], np.int32))
            kv.next_slot += fill
            kv.computed += fill
        if rest := piece.tokens - fill:
            new = self._new_entries(piece.instance, kv.computed, rest)
            run.extend(new, rest)
            parts.append(new)
            kv.next_slot = int(new[-1, 0] + new[-1, 2])
            kv.last_instance = piece.instance
            kv.computed += rest
        entries = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ShareSlots(request=piece.request, instance=piece.instance, entries=entries)

    def _new_entries(
        self, instance: InstanceId, position: int, tokens: int
    ) -> Int32[np.ndarray, "N 3"]:
        """Takes blocks for tokens from `position` on; all full but perhaps the last."""
        wanted = -(-tokens // self.block_size)
        entries = np.empty((wanted, 3), np.int32)
        entries[:, 0] = self._blocks[instance].take(wanted) * self.block_size
        entries[:, 1] = np.arange(position, position + tokens, self.block_size)
        entries[:, 2] = self.block_size
        entries[-1, 2] = tokens - (wanted - 1) * self.block_size
        return entries

    # ---- migrate ---------------------------------------------------------------------

    def _migrate(self, step: MigrateStep) -> MigrateSlots:
        for move in step.moves:
            check_instance(step, move.request, move.target, self.instances)
        cuts = cut_moves(step, self._held, self.block_size)
        wanted = [0] * self.instances
        for cut in cuts:
            wanted[cut.move.target] += len(cut.given)
        check_free(step, wanted, self._blocks, self.block_size)
        for cut in cuts:
            self._arrive(cut)
        for cut in cuts:
            self._leave(cut)
        return MigrateSlots(
            seq=step.seq,
            moves=tuple(
                MoveSlots(
                    request=cut.move.request,
                    source=cut.move.source,
                    target=cut.move.target,
                    taken=cut.taken,
                    given=cut.given,
                    left=cut.left,
                )
                for cut in cuts
            ),
        )

    def _arrive(self, cut: Cut) -> None:
        """Gives moved tokens their new blocks; they keep the old ones for now."""
        move, given = cut.move, cut.given
        kv = self._held[move.request]
        given[:, 0] = self._blocks[move.target].take(len(given)) * self.block_size
        kv.run_on(move.target).insert(given, move.tokens)
        if move.source == kv.last_instance:  # the newest token goes with the first such move
            kv.last_instance = move.target
            kv.next_slot = int(given[-1, 0] + given[-1, 2])

    def _leave(self, cut: Cut) -> None:
        """Gives up what a move leaves empty."""
        source, runs = cut.move.source, self._held[cut.move.request].runs
        dropped = runs[source].keep_oldest(cut.left)
        self._blocks[source].drop(dropped // self.block_size)
        if not runs[source].tokens:
            del runs[source]
        self._recount_shared(self._held[cut.move.request])

    # ---- where the next token fits ---------------------------------------------------

    def _room(self, kv: Holding | None) -> int:
        """Tokens that fit behind the newest one in its block; 0 while the block is shared."""
        if kv is None:
            return 0
        room = -kv.next_slot % self.block_size
        if room == 0 or kv.family is None:  # who was never forked shares nothing
            return room
        block = kv.next_slot // self.block_size
        return room if self._blocks[kv.last_instance].references[block] == 1 else 0
