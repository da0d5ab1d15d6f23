"""The host's copy of one instance's block table, and what changed since the device saw it.

Owns which rows of the table belong to which request. A request's entries stand together in
a region, so that the device reads them as one run of rows; regions have room to grow.

Promises: `append` costs O(1) amortised for each entry; whatever `region` names holds the
request's entries; replaying every `take_updates` gives the device the same rows. Rows
outside all regions may hold anything.
Not here: which slots a request has (`BlockAllocator` says so), and the transfer itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from loongjax.errors import IntegrityError
from loongjax.plan import RequestId

ENTRIES_PER_BLOCK = 2
"""Entries that a table has room for, for each block of its instance, shared blocks having one
for each holder. `BlockAllocator.can_fork` keeps to it; more costs memory and time to send."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TableUpdates:
    """What the device's table lacks.

    Attributes:
      whole: All of `BlockTable.entries` is to be sent; `updates` is empty then.
      updates: int32 [U, 4], `(index, slot, position, count)`, ascending by index.
    """

    whole: bool
    updates: Int32[np.ndarray, "U 4"]


class _Region:
    """Rows `start` to `start + size` are reserved, the first `length` are filled.

    `newest` is the place of the entry with the highest position; `next_slot` and
    `next_position` follow its last token.
    """

    __slots__ = ("length", "newest", "next_position", "next_slot", "size", "start")

    def __init__(self, start: int = 0, size: int = 0) -> None:
        self.start = start
        self.size = size
        self.length = 0
        self.newest = 0
        self.next_slot = self.next_position = -1

    @property
    def end(self) -> int:
        """The row behind those reserved."""
        return self.start + self.size


class BlockTable:
    """Regions of one flat table. Not thread-safe.

    Attributes:
      capacity: Rows of the table.
      block_size: Tokens per block.
      entries: int32 [capacity, 3] of `(slot, position, count)`; not to be written.
    """

    def __init__(self, *, capacity: int, block_size: int) -> None:
        """An empty table; `required_capacity` tells how many rows it needs."""
        self.capacity = capacity
        self.entries: Int32[np.ndarray, "capacity 3"] = np.zeros((capacity, 3), np.int32)
        self.block_size = block_size
        self._regions: dict[RequestId, _Region] = {}
        self._free: dict[int, list[int]] = {}  # starts of free regions, by size
        self._end = 0  # no region reaches this row
        self._changed_rows: set[int] = set()
        self._changed_ranges: list[range] = []

    @staticmethod
    def required_capacity(entries: int) -> int:
        """Rows that suffice whenever the table holds at most so many entries.

        A region is sized to a power of two, at most twice its entries, whenever it is made
        or grows. So after compaction all regions take at most `2 * entries` rows, with the
        one included that is about to grow. The third part keeps compactions rare: each
        frees at least `entries` rows, so it is paid for by the entries that fill them.
        """
        return 3 * entries

    def append(self, request: RequestId, entries: Int32[np.ndarray, "N 3"]) -> None:
        """Adds entries, positions ascending, behind those that the request has.

        A first entry that continues the one with the highest position in its block is merged
        with it, so that a block has one entry however often it was written. Entries that
        moved here may have lower positions than those that the request has.

        Raises:
          IntegrityError: The table is full; nothing has changed then.
        """
        added = len(entries)
        if added == 0:
            return
        slot, position, count = entries[0].tolist()
        region = self._regions.get(request) or _Region()
        continues = (
            slot == region.next_slot
            and position == region.next_position
            and slot % self.block_size != 0
        )
        length = region.length + added - continues
        if length > region.size:
            self._reserve(request, region, length)
        if continues:
            row = region.start + region.newest
            self.entries[row, 2] += count
            self._changed_rows.add(row)
            entries = entries[1:]
        if length > region.length:
            first, end = region.start + region.length, region.start + length
            self.entries[first:end] = entries
            if end - first == 1:
                self._changed_rows.add(first)
            else:
                self._changed_ranges.append(range(first, end))
            region.length = length
        if added > 1:
            slot, position, count = entries[-1].tolist()
        if position >= region.next_position:
            if added > continues:
                region.newest = region.length - 1
            region.next_slot = slot + count
            region.next_position = position + count

    def append_token(self, request: RequestId, slot: int, position: int) -> None:
        """`append` for one token. O(1), without an array where the token joins an entry."""
        region = self._regions.get(request)
        if (
            region is not None
            and slot == region.next_slot
            and position == region.next_position
            and slot % self.block_size != 0
        ):
            row = region.start + region.newest
            self.entries[row, 2] += 1
            self._changed_rows.add(row)
            region.next_slot, region.next_position = slot + 1, position + 1
        else:
            self.append(request, np.array([[slot, position, 1]], np.int32))

    def fork(self, source: RequestId, target: RequestId) -> None:
        """Gives `target`, which has none, the entries of `source` too. O(entries).

        Raises:
          IntegrityError: The table is full; nothing has changed then.
        """
        start, length = self.region(source)
        if not length:
            return
        self.append(target, self.entries[start : start + length].copy())
        old, new = self._regions[source], self._regions[target]
        new.newest = old.newest
        new.next_slot, new.next_position = old.next_slot, old.next_position

    def replace(self, request: RequestId, entries: Int32[np.ndarray, "N 3"]) -> None:
        """Lets a request have these entries alone, positions ascending: no more than it has.

        Raises:
          IntegrityError: There are more; nothing has changed then.
        """
        start, length = self.region(request)
        if len(entries) > length:
            raise IntegrityError(
                f"request {request!r} has {length} entries in the block table, which cannot be "
                f"replaced by {len(entries)}. Add new ones with BlockTable.append."
            )
        if not len(entries):
            self.release(request)
            return
        region = self._regions[request]
        rows = self.entries[start : start + len(entries)]
        changed = np.flatnonzero((rows != entries).any(1)) + start
        rows[:] = entries
        self._changed_rows.update(changed.tolist())
        region.length = len(entries)
        region.newest = region.length - 1
        slot, position, count = entries[-1].tolist()
        region.next_slot, region.next_position = slot + count, position + count
        self._shrink(region)

    def region(self, request: RequestId) -> tuple[int, int]:
        """First row and number of a request's entries; (0, 0) if it has none."""
        region = self._regions.get(request)
        return (0, 0) if region is None else (region.start, region.length)

    def release(self, request: RequestId) -> None:
        """Forgets a request's entries. One without entries is no error."""
        region = self._regions.pop(request, None)
        if region is not None:
            self._give_back(region)

    def take_updates(self, limit: int) -> TableUpdates | None:
        """What changed since the last call; None if nothing did.

        Whole, if more than `limit` rows changed. Nothing is pending afterwards.
        """
        if not self._changed_rows and not self._changed_ranges:
            return None
        rows, ranges = self._changed_rows, self._changed_ranges
        self._changed_rows, self._changed_ranges = set(), []
        for changed in ranges:
            if max(len(changed), len(rows)) > limit:
                break
            rows.update(changed)
        else:
            if len(rows) <= limit:
                updated = np.fromiter(rows, np.intp, len(rows))
                updated.sort()
                updates = np.empty((len(rows), 4), np.int32)
                updates[:, 0] = updated
                updates[:, 1:] = self.entries[updated]
                return TableUpdates(whole=False, updates=updates)
        return TableUpdates(whole=True, updates=np.empty((0, 4), np.int32))

    # ---- rows ------------------------------------------------------------------------

    def _reserve(self, request: RequestId, region: _Region, length: int) -> None:
        """Makes room for `length` entries in a region that is new or too small."""
        size = 1 << length.bit_length()
        if region.size and region.end == self._end and region.start + size <= self.capacity:
            self._end = region.start + size
        elif (start := self._find(size)) is not None:
            old = _Region(start=region.start, size=region.size)
            self._move(region, start, self.entries)
            if old.size:
                self._give_back(old)
        else:
            self._compact(request, region, size)
        region.size = size
        self._regions[request] = region

    def _shrink(self, region: _Region) -> None:
        """Gives back the rows that a region of so many entries would not have reserved."""
        size = 1 << region.length.bit_length()
        while region.size > size:
            region.size //= 2
            self._give_back(_Region(start=region.end, size=region.size))

    def _find(self, size: int) -> int | None:
        """Takes so many rows: a free region of this size, else behind all others."""
        if free := self._free.get(size):
            return free.pop()
        if self._end + size > self.capacity:
            return None
        self._end += size
        return self._end - size

    def _give_back(self, region: _Region) -> None:
        if not self._regions:
            self._free.clear()
            self._end = 0
        elif region.end == self._end:
            self._end = region.start
        else:
            self._free.setdefault(region.size, []).append(region.start)

    def _move(self, region: _Region, start: int, rows: np.ndarray) -> None:
        """Puts a region's entries, as they stand in `rows`, elsewhere in the table."""
        if region.length and start != region.start:
            end = start + region.length
            self.entries[start:end] = rows[region.start : region.start + region.length]
            self._changed_ranges.append(range(start, end))
        region.start = start

    def _compact(self, request: RequestId, grown: _Region, size: int) -> None:
        """Puts all regions close together, and `grown` last with `size` rows."""
        others = [region for region in self._regions.values() if region is not grown]
        start = sum(region.size for region in others)
        if start + size > self.capacity:
            raise IntegrityError(
                f"a block table of {self.capacity} rows is full: {start} are reserved, and "
                f"request {request!r} with {grown.length} entries wants {size}. Size the table "
                f"by BlockTable.required_capacity for all blocks of the instance."
            )
        rows = self.entries[: self._end].copy()
        self._end = 0
        for region in others:
            self._move(region, self._end, rows)
            self._end += region.size
        self._move(grown, self._end, rows)
        self._end += size
        self._free.clear()
