"""Block tables: the host's rows, and a device that only sees the updates."""

from __future__ import annotations

import unittest
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loongjax.errors import IntegrityError, PlanError
from loongjax.kvcache import BlockAllocator, BlockTable, TableUpdates
from loongjax.kvcache.tables import ENTRIES_PER_BLOCK
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    MigrateStep,
    Move,
    Placement,
    PrefillStep,
    Share,
)
from tests.kvcache.steps import entries_of

BLOCKS = 24
NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f"])
HOMES = st.integers(0, 1)


class TableMachine(RuleBasedStateMachine):
    """Follows an allocator whose pool may fill up; both must name the same entries."""

    block_size = 0

    def __init__(self) -> None:
        super().__init__()
        slots = BLOCKS * self.block_size
        self.allocator = BlockAllocator(instances=2, slots=slots, block_size=self.block_size)
        # Less than `required_capacity`, and still enough: compaction happens more often.
        self.tables = [
            BlockTable(capacity=2 * ENTRIES_PER_BLOCK * BLOCKS, block_size=self.block_size)
            for _ in range(2)
        ]
        self.devices = [np.full((table.capacity, 3), -1, np.int32) for table in self.tables]
        self.names: set[str] = set()

    @rule(name=NAMES, home=HOMES, data=st.data())
    def chunk(self, name: str, home: int, data: st.DataObject) -> None:
        tail = self.allocator.whereabouts(name).tail
        room = tail.tokens if tail and tail.instance == home else 0
        most = self.allocator.free_slots(home) + room
        tokens = data.draw(st.integers(0, min(most, 9 * self.block_size)))
        start = self.allocator.computed(name)
        step = PrefillStep(
            seq=0,
            group=(0, 1),
            chunks=(Chunk(request=name, start=start, length=tokens, last=True),),
            keep=(Placement(request=name, shares=(Share(home, tokens),)),),
        )
        for share in self.allocator.apply(step).shares:
            self.tables[home].append(name, share.entries)
            self.names.add(name)

    @rule(name=NAMES, home=HOMES, tokens=st.integers(1, 20))
    def tokens(self, name: str, home: int, tokens: int) -> None:
        step = DecodeStep(seq=0, group=(0, 1), rows=(DecodeRow(name, home, home),))
        for _ in range(tokens):
            tail = self.allocator.whereabouts(name).tail
            fits = tail is not None and tail.instance == home
            if not fits and self.allocator.free_slots(home) == 0:
                return
            plan = self.allocator.apply(step)
            self.tables[home].append_token(name, plan.slots[0], plan.positions[0])
            self.names.add(name)

    @rule(name=NAMES, source=HOMES, data=st.data())
    def move(self, name: str, source: int, data: st.DataObject) -> None:
        target = 1 - source
        held = dict(self.allocator.shares(name)).get(source, 0)
        if held:
            tokens = data.draw(st.integers(1, held) | st.just(held))
            step = MigrateStep(seq=0, group=(0, 1), moves=(Move(name, source, target, tokens),))
            try:
                (move,) = self.allocator.apply(step).moves
            except PlanError:
                return
            self.tables[source].replace(name, move.left)
            self.tables[target].append(name, move.given)

    @rule(name=NAMES, copy=NAMES)
    def fork(self, name: str, copy: str) -> None:
        if self.allocator.can_fork(name) and not self.allocator.computed(copy):
            self.allocator.fork(name, copy)
            for table in self.tables:
                table.fork(name, copy)
            self.names.add(copy)

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        self.allocator.release(name)
        for table in self.tables:
            table.release(name)
        self.names.discard(name)

    @rule(home=HOMES, limit=st.integers(0, 12))
    def device_catches_up(self, home: int, limit: int) -> None:
        table, device = self.tables[home], self.devices[home]
        batch = table.take_updates(limit)
        if batch is not None and batch.whole:
            assert len(batch.updates) == 0
            device[:] = table.entries
        elif batch is not None:
            rows = batch.updates[:, 0]
            assert 1 <= len(rows) <= limit
            assert (np.diff(rows) > 0).all()
            device[rows] = batch.updates[:, 1:]
        for name in self.names:
            start, length = table.region(name)
            live = slice(start, start + length)
            np.testing.assert_array_equal(device[live], table.entries[live])
        assert table.take_updates(limit) is None

    @invariant()
    def regions_hold_the_entries_of_the_allocator(self) -> None:
        for home, table in enumerate(self.tables):
            rows: list[int] = []
            for name in self.names:
                start, length = table.region(name)
                rows += range(start, start + length)
                found = table.entries[start : start + length]
                by_position = found[np.argsort(found[:, 1])]
                np.testing.assert_array_equal(by_position, entries_of(self.allocator, name, home))
            assert len(set(rows)) == len(rows)


def machine(size: int) -> type[unittest.TestCase]:
    """The test of one block size."""
    made: Any = type(f"BlockSize{size}", (TableMachine,), {"block_size": size})
    made.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
    case: type[unittest.TestCase] = made.TestCase
    return case


TestBlockSize1 = machine(1)
TestBlockSize3 = machine(3)
TestBlockSize16 = machine(16)


def table(capacity: int = 64) -> BlockTable:
    return BlockTable(capacity=capacity, block_size=4)


def entries(*rows: tuple[int, int, int]) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, 3)


def held(of: BlockTable, request: str) -> list[list[int]]:
    start, length = of.region(request)
    rows: list[list[int]] = of.entries[start : start + length].tolist()
    return rows


def taken(batch: TableUpdates | None) -> list[list[int]]:
    assert batch is not None
    assert not batch.whole
    rows: list[list[int]] = batch.updates.tolist()
    return rows


def test_unknown_request_has_no_region() -> None:
    books = table()
    assert books.region("a") == (0, 0)
    books.release("a")
    books.append("a", entries())
    assert books.region("a") == (0, 0)
    assert books.take_updates(0) is None


def test_token_that_continues_the_last_entry_is_merged() -> None:
    books = table()
    books.append_token("a", 8, 0)
    books.append_token("a", 9, 1)
    books.append("a", entries((10, 2, 2), (4, 4, 1)))
    assert held(books, "a") == [[8, 0, 4], [4, 4, 1]]


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param((12, 4, 1), id="next block"),
        pytest.param((10, 5, 1), id="position not next"),
        pytest.param((11, 4, 1), id="slot not next"),
    ],
)
def test_token_that_does_not_continue_is_a_new_entry(entry: tuple[int, int, int]) -> None:
    books = table()
    last = (8, 0, 4) if entry[0] == 12 else (8, 2, 2)
    books.append("a", entries(last))
    books.append("a", entries(entry))
    assert held(books, "a") == [list(last), list(entry)]


def test_released_request_is_not_continued() -> None:
    books = table()
    books.append("a", entries((8, 0, 2)))
    books.release("a")
    books.append("a", entries((10, 2, 1)))
    assert held(books, "a") == [[10, 2, 1]]


def test_row_changed_twice_is_one_update() -> None:
    books = table()
    books.append("a", entries((8, 0, 1)))
    books.append("a", entries((9, 1, 1)))
    assert taken(books.take_updates(1)) == [[0, 8, 0, 2]]
    assert books.take_updates(1) is None


def test_rows_of_a_chunk_that_grew_since_count_once() -> None:
    books = table()
    books.append("a", entries((8, 0, 4), (4, 4, 2)))
    books.append("a", entries((6, 6, 1)))
    assert taken(books.take_updates(2)) == [[0, 8, 0, 4], [1, 4, 4, 3]]


@pytest.mark.parametrize(("limit", "whole"), [(4, False), (3, True)])
def test_whole_table_when_more_rows_changed_than_the_limit(limit: int, whole: bool) -> None:
    books = table()
    books.append("a", entries((8, 0, 4), (4, 4, 1)))
    books.append("b", entries((16, 0, 4), (20, 4, 1)))
    batch = books.take_updates(limit)
    assert batch is not None
    assert (batch.whole, batch.updates.shape) == (whole, (0 if whole else 4, 4))
    assert books.take_updates(limit) is None


def test_token_continues_the_newest_entry_wherever_it_stands() -> None:
    books = table()
    books.append("a", entries((8, 6, 2)))
    books.append("a", entries((16, 0, 4), (20, 4, 2)))  # moved here
    books.append_token("a", 10, 8)
    assert held(books, "a") == [[8, 6, 3], [16, 0, 4], [20, 4, 2]]
    books.append("a", entries((11, 9, 1), (24, 10, 3)))
    books.append("a", entries((27, 13, 1)))
    assert held(books, "a") == [[8, 6, 4], [16, 0, 4], [20, 4, 2], [24, 10, 4]]


def test_replaced_entries_are_updated_where_they_differ() -> None:
    books = table()
    books.append("a", entries((8, 0, 4), (4, 4, 4), (12, 8, 4)))
    books.take_updates(8)
    books.replace("a", entries((8, 0, 4), (4, 4, 1)))
    assert held(books, "a") == [[8, 0, 4], [4, 4, 1]]
    assert taken(books.take_updates(8)) == [[1, 4, 4, 1]]
    books.append("a", entries((16, 20, 1)))
    books.append("a", entries((17, 21, 1)))
    assert held(books, "a") == [[8, 0, 4], [4, 4, 1], [16, 20, 2]]


def test_replaced_by_nothing_is_released() -> None:
    books = table()
    books.append("a", entries((8, 0, 4)))
    books.replace("a", entries())
    assert books.region("a") == (0, 0)
    books.replace("a", entries())
    books.append("b", entries((8, 0, 4)))
    assert books.region("b") == (0, 1)


def test_replaced_by_more_is_refused() -> None:
    books = table()
    books.append("a", entries((8, 0, 4)))
    with pytest.raises(IntegrityError, match="has 1 entries in the block table"):
        books.replace("a", entries((8, 0, 4), (12, 4, 1)))
    assert held(books, "a") == [[8, 0, 4]]


def test_rows_that_a_region_gives_back_are_used_again() -> None:
    books = table(capacity=18)
    books.append("a", entries(*[(4 * i, 4 * i, 4) for i in range(7)]))  # 8 rows
    books.append("b", entries((40, 0, 4)))
    books.replace("a", entries((0, 0, 4)))
    books.append("c", entries((4, 0, 4), (8, 4, 4)))
    books.append("d", entries((12, 0, 4)))
    assert [books.region(name) for name in "acd"] == [(0, 1), (4, 2), (2, 1)]


def test_newest_region_grows_where_it_is() -> None:
    books = table()
    books.append("a", entries(*[(4 * i, 4 * i, 4) for i in range(3)]))
    books.take_updates(8)
    books.append("a", entries((12, 12, 4)))
    assert taken(books.take_updates(8)) == [[3, 12, 12, 4]]


def test_region_behind_which_another_stands_moves_and_its_rows_are_reused() -> None:
    books = table()
    books.append("a", entries((0, 0, 4)))
    books.append("b", entries((4, 0, 4)))
    books.append("a", entries((8, 4, 4), (16, 8, 4)))
    assert books.region("a")[0] > books.region("b")[0]
    assert held(books, "a") == [[0, 0, 4], [8, 4, 4], [16, 8, 4]]
    books.append("c", entries((12, 0, 4)))
    assert books.region("c") == (0, 1)


def test_rows_of_the_newest_region_are_used_again() -> None:
    books = table()
    for name in "abc":
        books.append(name, entries((0, 0, 4)))
    third = books.region("c")
    books.release("c")
    books.append("d", entries((4, 0, 4)))
    assert books.region("d") == third


def test_empty_table_starts_over() -> None:
    books = table()
    for name in "ab":
        books.append(name, entries((0, 0, 4)))
    for name in "ab":
        books.release(name)
    for slot, name in enumerate("cd"):
        books.append(name, entries((4 * slot, 0, 4)))
    assert (held(books, "c"), held(books, "d")) == ([[0, 0, 4]], [[4, 0, 4]])


def test_compaction_moves_the_grown_region_behind_the_others() -> None:
    books = table(capacity=10)
    for slot, name in enumerate("abcd"):
        books.append(name, entries((4 * slot, 0, 4)))
    books.release("c")
    books.take_updates(8)
    books.append("a", entries((16, 4, 4), (20, 8, 4)))
    assert books.region("a") == (4, 3)
    books.append("e", entries((24, 0, 4)))
    assert [held(books, name) for name in "abde"] == [
        [[0, 0, 4], [16, 4, 4], [20, 8, 4]],
        [[4, 0, 4]],
        [[12, 0, 4]],
        [[24, 0, 4]],
    ]
    # b, d and a moved; a grew; e is new.
    assert [row for row, *_ in taken(books.take_updates(8))] == [0, 2, 4, 5, 6, 8]


def test_full_table_is_refused_and_unchanged() -> None:
    books = table(capacity=7)
    books.append("a", entries((0, 0, 2)))
    books.append("b", entries((4, 0, 4)))
    books.take_updates(8)
    message = "table of 7 rows is full: 2 are reserved, and request 'a' with 1 entries wants 8"
    with pytest.raises(IntegrityError, match=message):
        books.append("a", entries((2, 2, 2), *[(4 * i, 4 * i - 4, 4) for i in range(2, 6)]))
    assert (held(books, "a"), held(books, "b")) == ([[0, 0, 2]], [[4, 0, 4]])
    assert books.take_updates(8) is None


def test_required_capacity_is_enough_for_fragments() -> None:
    """Many small regions, every second one freed, leave no run for one large region."""
    blocks = 32
    books = table(capacity=BlockTable.required_capacity(blocks))
    for i in range(blocks):
        books.append(f"r{i}", entries((4 * i, 0, 4)))
    for i in range(0, blocks, 2):
        books.release(f"r{i}")
    books.append("large", entries(*[(8 * i, 4 * i, 4) for i in range(blocks // 2)]))
    for i in range(1, blocks, 2):
        assert held(books, f"r{i}") == [[4 * i, 0, 4]]
    assert held(books, "large") == [[8 * i, 4 * i, 4] for i in range(blocks // 2)]
