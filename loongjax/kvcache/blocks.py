"""The blocks of one instance: how often each is held, and which are free.

Promises: the order in which blocks are given out depends only on the calls made; when all
are free it starts anew from block 0. Blocks that were held before go first, so that low
blocks are preferred; blocks taken together come ascending.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32


class Blocks:
    """Free blocks and reference counts.

    Attributes:
      count: Blocks there are; their ids count from 0.
      references: int32 [count], how many requests hold each block; 0: it is free.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.references = np.zeros(count, np.int32)
        # Free are: the first `_returned_count` of `_returned`, and all blocks from `_fresh`
        # on, which nobody held since the whole instance was last free.
        self._returned = np.zeros(count, np.int32)
        self._returned_count = 0
        self._fresh = 0

    @property
    def free(self) -> int:
        """How many blocks are free."""
        return self.count - self._fresh + self._returned_count

    @property
    def holders(self) -> int:
        """How often blocks are held, in sum. O(blocks)."""
        return int(self.references.sum())

    def shared_of(self, blocks: Int32[np.ndarray, " held"]) -> int:
        """How many of these blocks more than one request holds. O(blocks)."""
        return int((self.references[blocks] > 1).sum())

    def free_ids(self) -> Int32[np.ndarray, " free"]:
        """The free blocks, in no order. O(free)."""
        fresh = np.arange(self._fresh, self.count, dtype=np.int32)
        return np.concatenate([self._returned[: self._returned_count], fresh])

    def take_one(self) -> int:
        """Takes one block; the caller knows that one is free."""
        if self._returned_count:
            self._returned_count -= 1
            block = int(self._returned[self._returned_count])
        else:
            block = self._fresh
            self._fresh += 1
        self.references[block] = 1
        return block

    def take(self, wanted: int) -> Int32[np.ndarray, " wanted"]:
        """Takes blocks, ascending; the caller knows that as many are free."""
        reused = min(wanted, self._returned_count)
        start = self._returned_count - reused
        taken = np.empty(wanted, np.int32)
        taken[:reused] = np.sort(self._returned[start : self._returned_count])
        taken[reused:] = np.arange(self._fresh, self._fresh + wanted - reused)
        self._returned_count = start
        self._fresh += wanted - reused
        self.references[taken] = 1
        return taken

    def share(self, blocks: Int32[np.ndarray, " held"]) -> None:
        """One more request holds these blocks, each named once."""
        self.references[blocks] += 1

    def drop(self, blocks: Int32[np.ndarray, " held"]) -> None:
        """One request less holds these blocks, each named once."""
        self.references[blocks] -= 1
        freed = blocks[self.references[blocks] == 0]
        end = self._returned_count + len(freed)
        # Reversed, for the last one in is the first one out.
        self._returned[self._returned_count : end] = freed[::-1]
        self._returned_count = end
        if self.free == self.count:
            self._returned_count = self._fresh = 0
