"""The simulator's own books of the KV pool, against which the allocator is held.

Owns, for every block, who holds it, and for every request, how many tokens lie where. It is
filled from what the allocator tells executors alone, as devices are, and refuses whatever
devices would answer with wrong tokens: a block given out twice, tokens written outside of
their request's blocks, KV that went missing. Costs O(blocks changed) a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from loongjax.errors import IntegrityError
from loongjax.kvcache import BlockAllocator, DecodeSlots, MigrateSlots, PrefillSlots
from loongjax.kvcache.messages import SlotPlan
from loongjax.plan import DecodeStep, InstanceId, RequestId, Step

_HINT = "The allocator and the simulator disagree; this is a fault in loongjax, please report it"


class Held:
    """KV of one request.

    Attributes:
      mark: Stands for it in the books of blocks.
      total: All its KV tokens.
      tokens: Those by instance.
      blocks: Its blocks by instance.
    """

    __slots__ = ("blocks", "mark", "tokens", "total")

    def __init__(self, mark: int) -> None:
        self.mark = mark
        self.total = 0
        self.tokens: dict[InstanceId, int] = {}
        self.blocks: dict[InstanceId, list[int]] = {}


class Ledger:
    """See the module. Requests are known from `open` to `close`."""

    def __init__(self, allocator: BlockAllocator) -> None:
        """`allocator` must be empty; it is only asked how much is in use."""
        self._allocator = allocator
        self._size = allocator.block_size
        blocks = allocator.slots // self._size
        self._owners = [array("i", bytes(4 * blocks)) for _ in range(allocator.instances)]
        self._used = [0] * allocator.instances
        self._held: dict[RequestId, Held] = {}
        self._marks = 0

    def open(self, request: RequestId) -> Held:
        """A request came; what it holds can be read in the result from now on."""
        self._marks += 1
        held = self._held[request] = Held(self._marks)
        return held

    def close(self, request: RequestId) -> None:
        """A request left, with its KV."""
        self.drop(request)
        del self._held[request]

    def drop(self, request: RequestId) -> None:
        """A request's KV is gone."""
        held = self._held[request]
        for instance, blocks in held.blocks.items():
            self._owner_array(instance)[blocks] = 0
            self._used[instance] -= len(blocks)
        held.tokens.clear()
        held.blocks.clear()
        held.total = 0

    def tokens(self, request: RequestId) -> Mapping[InstanceId, int]:
        """KV tokens of a request by instance."""
        return self._held[request].tokens

    def apply(self, step: Step, slots: SlotPlan) -> None:
        """A step was launched, and writes these slots.

        Raises:
          IntegrityError: A block belongs to another request, or to nobody.
        """
        if isinstance(slots, DecodeSlots) and isinstance(step, DecodeStep):
            self._decode(step, slots)
        elif isinstance(slots, PrefillSlots):
            for share in slots.shares:
                self._write(share.request, share.instance, share.entries)
        elif isinstance(slots, MigrateSlots):
            for move in slots.moves:
                count = int(move.taken[:, 2].sum())
                self._keep(move.request, move.source, move.left, count)
                self._write(move.request, move.target, move.given)

    def check(self) -> None:
        """Holds the allocator's totals against these. O(instances).

        Raises:
          IntegrityError: They differ.
        """
        for instance, blocks in enumerate(self._used):
            if self._allocator.used_slots(instance) != blocks * self._size:
                raise IntegrityError(
                    f"instance {instance}: the allocator says that "
                    f"{self._allocator.used_slots(instance)} slots are in use, steps took "
                    f"{blocks * self._size}. {_HINT}"
                )

    def _decode(self, step: DecodeStep, slots: DecodeSlots) -> None:
        for (request, _, home), slot in zip(step.rows, slots.slots, strict=True):
            self._write_one(request, home, slot, 1)

    def _write_one(self, request: RequestId, home: InstanceId, slot: int, count: int) -> None:
        """Tokens in one block; thousands of decodes do not pay for arrays."""
        held, owners = self._held[request], self._owners[home]
        block, begun = divmod(slot, self._size)
        if owners[block] != (held.mark if begun else 0):
            self._refuse(request, home, block)
        if not begun:
            owners[block] = held.mark
            self._used[home] += 1
            held.blocks.setdefault(home, []).append(block)
        held.tokens[home] = held.tokens.get(home, 0) + count
        held.total += count

    def _write(
        self, request: RequestId, instance: InstanceId, entries: Int[np.ndarray, "N 3"]
    ) -> None:
        if len(entries) == 1:
            slot, _, count = entries[0].tolist()
            self._write_one(request, instance, slot, count)
            return
        held = self._held[request]
        owners = self._owner_array(instance)
        begins = entries[:, 0] % self._size == 0
        blocks = entries[:, 0] // self._size
        wrong = owners[blocks] != np.where(begins, 0, held.mark)
        if wrong.any():
            self._refuse(request, instance, int(blocks[wrong][0]))
        new = blocks[begins]
        owners[new] = held.mark
        self._used[instance] += len(new)
        held.blocks.setdefault(instance, []).extend(new.tolist())
        count = int(entries[:, 2].sum())
        held.tokens[instance] = held.tokens.get(instance, 0) + count
        held.total += count

    def _keep(
        self,
        request: RequestId,
        instance: InstanceId,
        left: Int[np.ndarray, "K 3"],
        count: int,
    ) -> None:
        """A request keeps the blocks of these entries on an instance, and loses `count` tokens."""
        held = self._held[request]
        kept = (left[:, 0] // self._size).tolist()
        gone = list(set(held.blocks[instance]).difference(kept))
        self._owner_array(instance)[gone] = 0
        self._used[instance] -= len(gone)
        held.blocks[instance] = kept
        held.tokens[instance] -= count
        held.total -= count
        if not held.tokens[instance]:
            del held.tokens[instance], held.blocks[instance]

    def _owner_array(self, instance: InstanceId) -> Int[np.ndarray, " blocks"]:
        return np.frombuffer(self._owners[instance], np.int32)

    def _refuse(self, request: RequestId, instance: InstanceId, block: int) -> None:
        owner = self._owners[instance][block]
        names = [name for name, held in self._held.items() if held.mark == owner]
        raise IntegrityError(
            f"request {request!r} writes to block {block} of instance {instance}, which belongs "
            f"to {names[0] if names else 'nobody'!r}. {_HINT}"
        )
