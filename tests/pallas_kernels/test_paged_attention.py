"""Queries over blocks of a pool, against the reference over all slots under a mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.kvcache.pool import from_stored
from pallas_kernels import reference
from pallas_kernels.paged_attention import (
    RowTables,
    chunk_entries,
    gather_heads,
    paged_attention,
    spread_heads,
)
from pallas_kernels.partials import Partial
from tests.pallas_kernels import exact
from tests.pallas_kernels.cases import assert_close, draw, rounding_bounds

ROWS, LAYERS, HEAD_DIM = 5, 2, 8
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Shape:
    """What is compiled. bfloat16 is stored as uint16."""

    block_size: int
    blocks: int
    heads: int
    kv_heads: int
    dtype: str
    soft_cap: float | None = None

    @property
    def options(self) -> dict:
        return {"scale": SCALE, "soft_cap": self.soft_cap}

    @property
    def slots(self) -> int:
        return self.block_size * self.blocks

    @property
    def table_entries(self) -> int:
        return 3 * self.blocks + chunk_entries(self.block_size)


SHAPES = [
    Shape(1, 300, 4, 2, "float32"),
    Shape(3, 100, 9, 3, "bfloat16", soft_cap=2.0),
    Shape(16, 20, 4, 4, "float32"),
    Shape(16, 20, 9, 3, "float32", soft_cap=2.0),
    Shape(128, 4, 4, 1, "bfloat16"),
]


@dataclass
class Case:
    """Queries, pools and tables; `listed_RxS` and `position_RxS` say the same obviously."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    rows: RowTables
    listed_RxS: np.ndarray
    position_RxS: np.ndarray


def random_case(shape: Shape, seed: int, windowed: bool) -> Case:
    """Requests of random lengths, blocks anywhere in the pool, some of them shared.

    NaN stands in every slot that no row lists, and rubbish in the table around the rows'.
    """
    rng = np.random.default_rng(seed)
    pool = (LAYERS, shape.slots + shape.block_size, shape.kv_heads, HEAD_DIM)
    case = Case(
        q=draw(rng, (ROWS, shape.heads, HEAD_DIM), shape.dtype),
        k=draw(rng, pool, shape.dtype),
        v=draw(rng, pool, shape.dtype),
        rows=RowTables(
            rng.integers(-(2**30), 2**30, (shape.table_entries, 3), np.int32),
            *np.zeros((4, ROWS), np.int32),
        ),
        listed_RxS=np.zeros((ROWS, shape.slots + shape.block_size), bool),
        position_RxS=np.zeros((ROWS, shape.slots + shape.block_size), int),
    )
    at = int(rng.integers(0, 3))
    for row in range(ROWS):
        wanted = rng.choice([0, 1, shape.blocks // 4, shape.blocks // 2])
        at += fill_row(case, row, at, rng.permutation(shape.blocks)[:wanted], shape, rng)
    if windowed:
        case.rows.first_R[:] = case.rows.position_R - rng.integers(1, 2 * shape.slots, ROWS) // 4
    unlisted = ~case.listed_RxS.any(0)
    case.k[:, unlisted] = case.v[:, unlisted] = np.nan
    return case


def fill_row(case: Case, row: int, at: int, blocks: np.ndarray, shape: Shape, rng) -> int:
    """Gives a row these blocks, each filled from its first slot on, entries in any order.

    Returns how many entries it took. Positions leave gaps: other instances have those.
    """
    position = 0
    entries = []
    for block in blocks:
        position += int(rng.integers(0, 2)) * shape.block_size
        slot, count = block * shape.block_size, int(rng.integers(1, shape.block_size + 1))
        entries.append((slot, position, count))
        case.listed_RxS[row, slot : slot + count] = True
        case.position_RxS[row, slot : slot + count] = position + np.arange(count)
        position += count
    if entries:
        case.rows.table_Nx3[at : at + len(entries)] = rng.permutation(np.array(entries))
    case.rows.start_R[row] = at
    case.rows.entries_R[row] = len(entries)
    case.rows.position_R[row] = rng.integers(position // 2, position + 2)
    return len(entries)


def stored(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.float32 else values.view(np.uint16)


@lru_cache
def compiled(shape: Shape):
    return jax.jit(
        partial(paged_attention, block_size=shape.block_size, decode=from_stored, **shape.options)
    )


@lru_cache
def compiled_reference(shape: Shape):
    return jax.jit(partial(reference.attention, **shape.options))


def visible(case: Case) -> np.ndarray:
    before = case.position_RxS < case.rows.position_R[:, None]
    return case.listed_RxS & before & (case.position_RxS >= case.rows.first_R[:, None])


def check(case: Case, shape: Shape, layer: int) -> Partial:
    k, v = case.k[layer], case.v[layer]
    found = compiled(shape)(
        case.q, stored(case.k), stored(case.v), case.rows, layer=np.int32(layer)
    )
    wanted = compiled_reference(shape)(case.q, k, v, visible(case))
    used = visible(case).any(0)
    bounds = rounding_bounds(case.q, k[used], v[used], scale=SCALE)
    assert_close(found, wanted, bounds)
    wanted = exact.attention(case.q, k, v, visible(case), **shape.options)
    exact.error_of(found, wanted, shape.dtype, kernel="paged_attention", path="XLA")
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=25)
@given(seed=st.integers(0, 9999), windowed=st.booleans(), layer=st.integers(0, LAYERS - 1))
def test_rows_attend_to_what_their_entries_name(shape, seed, windowed, layer):
    check(random_case(shape, seed, windowed), shape, layer)


def test_a_row_without_entries_gives_nothing_at_all():
    shape = SHAPES[0]
    case = random_case(shape, 0, False)
    case.rows.entries_R[:] = 0
    case.listed_RxS[:] = False
    found = check(case, shape, 0)
    assert not np.asarray(found.o).any()
    assert np.isneginf(np.asarray(found.lse)).all()


def test_order_of_entries_does_not_matter():
    shape = SHAPES[2]
    case = random_case(shape, 3, True)
    table = case.rows.table_Nx3
    for start, entries in zip(case.rows.start_R, case.rows.entries_R, strict=True):
        table[start : start + entries] = table[start : start + entries][::-1].copy()
    check(case, shape, 1)


def test_a_row_does_not_depend_on_its_company():
    shape = SHAPES[3]
    case = random_case(shape, 5, False)
    together = check(case, shape, 0)
    assert (case.rows.entries_R > 0).sum() > 1
    for row in range(ROWS):
        alone = np.zeros(ROWS, np.int32)
        alone[row] = case.rows.entries_R[row]
        rows = case.rows._replace(entries_R=alone)
        found = compiled(shape)(case.q, case.k, case.v, rows, layer=np.int32(0))
        np.testing.assert_array_equal(found.o[row], together.o[row])
        np.testing.assert_array_equal(found.lse[row], together.lse[row])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (9, 3)])
def test_spread_queries_meet_their_own_kv_head_alone(heads, kv_heads):
    rng = np.random.default_rng(0)
    q, k = draw(rng, (2, heads, 8), "float32"), draw(rng, (kv_heads, 8), "float32")
    spread = spread_heads(jnp.asarray(q), kv_heads)
    found = np.asarray(spread, np.float64) @ k.reshape(-1).astype(np.float64)
    wanted = (q.astype(np.float64) * np.repeat(k, heads // kv_heads, axis=0)).sum(-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    np.testing.assert_array_equal(gather_heads(spread, kv_heads), q)


@pytest.mark.parametrize(
    ("block_size", "entries"), [(1, 128), (3, 42), (16, 8), (128, 1), (512, 1)]
)
def test_a_chunk_is_128_tokens_or_one_block(block_size, entries):
    assert chunk_entries(block_size) == entries
