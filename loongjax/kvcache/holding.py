"""Where the KV of one request lies: its entries on every instance that has some.

Plain records; `loongjax.kvcache.BlockAllocator` decides what stands in them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from loongjax.plan import RequestId, Share

_FIRST_ROOM = 4


class Whereabouts(NamedTuple):
    """Where a request's KV lies, in token counts.

    computed: all its KV tokens.
    shares: those by instance, ascending; no empty shares.
    tail: where the next token needs no new block, and for how many tokens that holds.
    holes: slots in its blocks that its next tokens cannot take, by instance; no empty shares.
      They lie behind a token that was not its newest when more came, or that was left behind
      by a move.
    shared: slots of its blocks that others hold too, by instance; no empty shares.
    """

    computed: int
    shares: tuple[Share, ...]
    tail: Share | None
    holes: tuple[Share, ...]
    shared: tuple[Share, ...]


NOWHERE = Whereabouts(0, (), None, (), ())


class Run:
    """The entries of one request on one instance, in the order of their positions.

    Each entry is a block of its own and begins where the block begins.

    Attributes:
      tokens: Sum of the entries' counts.
    """

    __slots__ = ("_buffer", "_length", "_unwritten", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self._unwritten = 0  # tokens of the last block that the buffer does not count yet
        self._length = 0
        self._buffer = np.empty((_FIRST_ROOM, 3), np.int32)

    @property
    def blocks(self) -> int:
        """How many entries there are."""
        return self._length

    @property
    def entries(self) -> Int32[np.ndarray, "N 3"]:
        """A view of `(slot, position, count)`, valid until the next change."""
        self._write()
        return self._buffer[: self._length]

    def fill_last(self, tokens: int) -> None:
        """The last block takes more tokens."""
        self._unwritten += tokens
        self.tokens += tokens

    def add_token(self, slot: int, position: int) -> None:
        """A new block with one token."""
        self._write()
        if self._length == len(self._buffer):
            self._grow(1)
        self._buffer[self._length] = (slot, position, 1)
        self._length += 1
        self.tokens += 1

    def extend(self, entries: Int32[np.ndarray, "N 3"], tokens: int) -> None:
        """New blocks; `tokens` is the sum of their counts."""
        self._write()
        end = self._length + len(entries)
        if end > len(self._buffer):
            self._grow(len(entries))
        self._buffer[self._length : end] = entries
        self._length = end
        self.tokens += tokens

    def insert(self, entries: Int32[np.ndarray, "N 3"], tokens: int) -> None:
        """New blocks with tokens of any positions. O(entries)."""
        self.extend(entries, tokens)
        merged = self.entries
        merged[:] = merged[np.argsort(merged[:, 1], kind="stable")]

    def keep_oldest(self, left: Int32[np.ndarray, "K 3"]) -> Int32[np.ndarray, " dropped"]:
        """Shrinks to `left`, which is how it begins, its last entry perhaps cut short.

        Returns:
          Where the blocks begin that it gives up.
        """
        dropped = self.entries[len(left) :, 0].copy()
        self._length = len(left)
        self.entries[:] = left
        self.tokens = int(left[:, 2].sum())
        return dropped

    def copy(self) -> Run:
        """The same entries, to be changed apart."""
        new = Run()
        new.extend(self.entries, self.tokens)
        return new

    def _write(self) -> None:
        if self._unwritten:
            self._buffer[self._length - 1, 2] += self._unwritten
            self._unwritten = 0

    def _grow(self, wanted: int) -> None:
        room = max(2 * len(self._buffer), self._length + wanted)
        buffer = np.empty((room, 3), np.int32)
        buffer[: self._length] = self.entries
        self._buffer = buffer


class Holding:
    """All KV of one request.

    Attributes:
      computed: Tokens that have KV; also the position of the next one.
      runs: Entries on each instance that has some.
      last_instance: Where the newest token lies; -1 before the first.
      next_slot: The slot behind the newest token. The newest block is partly filled
        unless this is a multiple of the block size.
      family: Those that were forked from one another and have KV still, with this one; None
        if it was never forked.
      shared: See `Whereabouts`; None when it has to be counted anew.
    """

    __slots__ = ("computed", "family", "last_instance", "next_slot", "runs", "shared")

    def __init__(self) -> None:
        self.computed = 0
        self.runs: dict[int, Run] = {}
        self.last_instance = -1
        self.next_slot = 0
        self.family: set[RequestId] | None = None
        self.shared: tuple[Share, ...] | None = ()

    def run_on(self, instance: int) -> Run:
        """The run on an instance; an empty one is made if there is none."""
        run = self.runs.get(instance)
        if run is None:
            run = self.runs[instance] = Run()
        return run

    def copy(self) -> Holding:
        """The same KV under another name, to be changed apart. O(entries)."""
        new = Holding()
        new.computed = self.computed
        new.runs = {instance: run.copy() for instance, run in self.runs.items()}
        new.last_instance = self.last_instance
        new.next_slot = self.next_slot
        new.family = self.family
        return new
