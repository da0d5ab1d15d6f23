"""The hardware paths of `paged_attention`, interpreted, against float64 over all slots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from loongjax.kvcache.pool import from_stored
from pallas_kernels.gpu import paged_attention as gpu
from pallas_kernels.gpu.paged_attention import Tiling, tiling_for
from pallas_kernels.partials import Partial, merge
from pallas_kernels.tpu import paged_attention as tpu
from tests.pallas_kernels import exact
from tests.pallas_kernels.races import no_races
from tests.pallas_kernels.test_paged_attention import (
    LAYERS,
    ROWS,
    Case,
    Shape,
    random_case,
    stored,
    visible,
)


@dataclass(frozen=True)
class Path:
    """A hardware path and the shape it is compiled for; `tiling` None is the TPU's."""

    shape: Shape
    rows_at_once: int
    tiling: Tiling | None = None


PATHS = [
    Path(Shape(4, 20, 9, 3, "float32"), 1, Tiling(1, 16, 4)),
    Path(Shape(1, 80, 4, 1, "bfloat16", soft_cap=2.0), 3, Tiling(3, 32, 1)),
    Path(Shape(3, 30, 4, 4, "float32"), 3, Tiling(3, 16, 2)),
    Path(Shape(4, 60, 9, 3, "float32", soft_cap=2.0), 3),
    Path(Shape(1, 150, 4, 1, "bfloat16"), 1),
    Path(Shape(16, 12, 4, 4, "float32"), 2),
]
GPU, TPU = PATHS[0], PATHS[3]


@lru_cache
def compiled(path: Path, interpret=True):
    attend = tpu.paged_attention if path.tiling is None else gpu.paged_attention
    options = {} if path.tiling is None else {"tiling": path.tiling}
    options |= {**path.shape.options, "rows_at_once": path.rows_at_once}
    return jax.jit(
        partial(
            attend,
            **options,
            block_size=path.shape.block_size,
            decode=from_stored,
            interpret=interpret,
        )
    )


def attend(path: Path, case: Case, layer: int, interpret=True) -> Partial:
    return compiled(path, interpret)(
        case.q, stored(case.k), stored(case.v), case.rows, layer=np.int32(layer)
    )


def check(path: Path, case: Case, layer: int, interpret=True) -> None:
    found = attend(path, case, layer, interpret)
    k, v = case.k[layer], case.v[layer]
    wanted = exact.attention(case.q, k, v, visible(case), **path.shape.options)
    name = "TPU" if path.tiling is None else "GPU"
    exact.assert_near(found, wanted, path.shape.dtype, kernel="paged_attention", path=name)


def share_entries(case: Case, rows: slice) -> None:
    """Lets rows read what the first of them reads, as far as each its own position allows."""
    for of_row in (case.rows.start_R, case.rows.entries_R, case.listed_RxS, case.position_RxS):
        of_row[rows] = of_row[rows.start]


@pytest.mark.parametrize("path", PATHS, ids=str)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 9999),
    windowed=st.booleans(),
    layer=st.integers(0, LAYERS - 1),
    sharing=st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS)),
)
def test_rows_attend_to_what_their_entries_name(path, seed, windowed, layer, sharing):
    case = random_case(path.shape, seed, windowed)
    share_entries(case, slice(sharing[0], sum(sharing)))
    check(path, case, layer)


def test_tpu_copies_do_not_race():
    """Memory that was never written is NaN under this interpreter."""
    case = random_case(TPU.shape, 11, True)
    share_entries(case, slice(1, 3))
    with no_races():
        check(TPU, case, 1, pltpu.InterpretParams(detect_races=True))


@pytest.mark.parametrize("path", [GPU, TPU], ids=str)
def test_a_row_without_entries_merges_to_exactly_nothing(path):
    case = random_case(path.shape, 0, False)
    case.rows.entries_R[2:] = 0
    case.listed_RxS[2:] = False
    check(path, case, 0)
    nothing = Partial(*(leaf[2:] for leaf in attend(path, case, 0)))
    other = Partial(*(leaf[2:] for leaf in attend(path, random_case(path.shape, 1, False), 0)))
    for pair in ((nothing, other), (other, nothing)):
        merged = merge(*(jnp.stack(leaves) for leaves in zip(*pair, strict=True)))
        np.testing.assert_array_equal(merged.o, other.o)
        np.testing.assert_array_equal(merged.lse, other.lse)


@pytest.mark.parametrize("path", [GPU, TPU], ids=str)
def test_no_rows_with_entries_at_all(path):
    case = random_case(path.shape, 0, False)
    case.rows.entries_R[:] = 0
    found = attend(path, case, 0)
    assert not np.asarray(found.o).any()
    assert np.isneginf(np.asarray(found.lse)).all()


@pytest.mark.parametrize("path", [GPU, TPU], ids=str)
def test_a_row_does_not_depend_on_its_company(path):
    case = random_case(path.shape, 5, False)
    together = attend(path, case, 0)
    assert (case.rows.entries_R > 0).sum() > 1
    for row in range(ROWS):
        alone = np.zeros(ROWS, np.int32)
        alone[row] = case.rows.entries_R[row]
        changed = Case(case.q, case.k, case.v, case.rows._replace(entries_R=alone), None, None)
        found = attend(path, changed, 0)
        np.testing.assert_array_equal(found.o[row], together.o[row])
        np.testing.assert_array_equal(found.lse[row], together.lse[row])


def test_gpu_splits_the_keys_of_few_rows():
    splits = [
        tiling_for(rows, 8, 128, 2, rows_at_once=at_once).splits
        for rows, at_once in ((1, 1), (8, 1), (64, 1), (2048, 64))
    ]
    assert splits == [32, 4, 1, 1]
    with pytest.raises(ValueError, match="head_dim 80 must be a power of two"):
        tiling_for(1, 8, 80, 2, rows_at_once=1)


@pytest.mark.parametrize(
    ("block_size", "kv_heads", "entries"), [(16, 8, 8), (16, 1, 32), (1, 8, 128), (128, 8, 1)]
)
def test_tpu_chunks_are_worth_a_copy(block_size, kv_heads, entries):
    assert tpu.entries_at_once(block_size, kv_heads, 128, 2) == entries
