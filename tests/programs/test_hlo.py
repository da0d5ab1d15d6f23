"""Facts about compiled programs that no result shows: what they copy, and what they send."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.aot.hlo import moves_of, parse, traffic
from loongjax.cluster.mesh import GroupMeshes, device_grid
from loongjax.esp.meta import Kind
from loongjax.kvcache.pool import padded_slots, stored_dtype
from loongjax.models.products import Products
from loongjax.programs import build
from loongjax.programs.build import ProgramShapes, lower
from loongjax.programs.spec import ProgramSpec
from pallas_kernels.backends import kernels_of
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import RowTables, paged_attention
from tests.esp.rig import TINY

SLOTS = 16382  # one pool is larger than everything else in these programs together
BLOCK_SIZE = 4
LOCAL_POOL = (TINY.layers, padded_slots(SLOTS, BLOCK_SIZE), TINY.kv_heads, TINY.head_dim)
TOKENS, ROWS = 64, 4
SIZES = {"prefill": TOKENS, "extend": TOKENS, "decode": ROWS, "migrate": 128}


def compiled(kind: Kind, degree: int, dtype: str) -> jax.stages.Compiled:
    shapes = ProgramShapes(
        config=TINY,
        tp=1,
        dtype=jnp.dtype(dtype),
        stored_dtype=stored_dtype(jnp.dtype(dtype), "cpu"),
        stacked=False,
        products=Products.CPU,
        slots=SLOTS,
        block_size=BLOCK_SIZE,
        table_entries=1000,
    )
    spec = ProgramSpec(kind=kind, degree=degree, bucket=SIZES[kind], rows=ROWS)
    meshes = GroupMeshes(device_grid(degree, 1))
    return lower(spec, shapes, meshes[tuple(range(degree))]).compile()


@pytest.fixture(scope="module")
def programs():
    """Compiles each program once."""
    made = {}

    def get(*what) -> jax.stages.Compiled:
        if what not in made:
            made[what] = compiled(*what)
        return made[what]

    return get


PROGRAMS = [
    *itertools.product(["prefill", "decode"], [1, 2, 4], ["float32", "bfloat16"]),
    *[("extend", 1, "float32"), ("extend", 2, "bfloat16"), ("extend", 4, "float32")],
    *[("migrate", 2, "float32"), ("migrate", 4, "bfloat16")],
]


@pytest.mark.parametrize(("kind", "degree", "dtype"), PROGRAMS)
def test_no_program_copies_the_pool(programs, kind, degree, dtype):
    program = programs(kind, degree, dtype)
    assert moves_of(int(np.prod(LOCAL_POOL)), parse(program.as_text())) == []
    one_pool = int(np.prod(LOCAL_POOL)) * jnp.dtype(dtype).itemsize
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * one_pool  # K and V come back where they were
    assert memory.temp_size_in_bytes < one_pool


# ---- the detector: each of these makes XLA copy a pool, or convert it --------------------


def read_older_pool(pool, rows, slot):
    """A query that comes from what was written attends over the pool before the write."""
    new = kv_write(pool, rows, slot, layer=0)
    q = jnp.tile(new[0, :1], (1, TINY.heads // TINY.kv_heads, 1))
    one = jnp.ones(1, jnp.int32)
    tables = RowTables(jnp.tile(slot[:1] + 1, (40, 3)), one * 0, one, one * 8, one * 0)
    return new, paged_attention(q, pool, pool, tables, layer=0, block_size=4, scale=1.0).o


def keep_bfloat16(pool, rows, slot):
    return kv_write(pool, rows, slot, layer=0)


def slice_a_layer_out(pool, rows, slot):
    return pool.at[1].set(kv_write(pool[:1], rows, slot, layer=0)[0])


@pytest.mark.parametrize(
    ("bad", "dtype", "move", "share"),
    [
        (read_older_pool, "float32", " copy(", 1),
        (keep_bfloat16, "bfloat16", " convert(", 1),
        (slice_a_layer_out, "float32", " slice(", TINY.layers),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_detector_fires(bad, dtype, move, share):
    rows = jnp.ones((2, TINY.kv_heads, TINY.head_dim), dtype)
    pool, slot = jax.ShapeDtypeStruct(LOCAL_POOL, dtype), jnp.arange(2)
    program = jax.jit(bad, donate_argnums=0).lower(pool, rows, slot).compile()
    found = moves_of(int(np.prod(LOCAL_POOL)) // share, parse(program.as_text()))
    assert any(move in line for line in found), found


# ---- traffic --------------------------------------------------------------------------


def keep_only_the_own_stripe(degree: int):
    """A `kv_write` that writes K and V at hop 0 alone: prefill as it were without retention."""
    calls = itertools.count()

    def write(pool, rows_TxGxD, slot_T, *, layer):
        hop = next(calls) // 2 % degree
        return kv_write(pool, rows_TxGxD, slot_T, layer=layer) if hop == 0 else pool

    return write


@pytest.mark.parametrize("degree", [2, 4])
def test_retention_sends_nothing(programs, monkeypatch, degree):
    retaining = programs("prefill", degree, "float32").as_text()
    forgetful = replace(kernels_of("xla"), kv_write=keep_only_the_own_stripe(degree))
    monkeypatch.setattr(build, "kernels_of", lambda *_: forgetful)
    plain = compiled("prefill", degree, "float32").as_text()
    writes = [text.count(" scatter(") for text in (retaining, plain)]
    assert writes == [2 * TINY.layers * degree, 2 * TINY.layers]
    assert traffic(parse(retaining)) == traffic(parse(plain))


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_prefill_sends_each_stripe_round_the_ring_and_nothing_else(programs, degree):
    found = traffic(parse(programs("prefill", degree, "float32").as_text()))
    hops = TINY.layers * (degree - 1)
    stripe_bytes = TOKENS * 2 * TINY.kv_heads * TINY.head_dim * 4
    assert found.counts["collective-permute"] == hops
    assert found.result_bytes["collective-permute"] == hops * stripe_bytes
    assert found.counts["reduce-scatter"] == (degree > 1)
    assert found.counts.total() == hops + (degree > 1)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_decode_sends_new_tokens_and_partials_and_nothing_else(programs, degree):
    found = traffic(parse(programs("decode", degree, "float32").as_text()))
    if degree == 1:
        assert found.counts.total() == 0
        return
    rows = degree * ROWS
    new = rows * (TINY.heads + 2 * TINY.kv_heads) * TINY.head_dim * 4
    partials = rows * TINY.heads * (TINY.head_dim + 1) * 4
    assert found.counts == {"all-gather": TINY.layers + 1, "all-to-all": TINY.layers}
    assert found.result_bytes["all-gather"] == TINY.layers * new + rows * 4
    assert found.result_bytes["all-to-all"] == TINY.layers * partials
