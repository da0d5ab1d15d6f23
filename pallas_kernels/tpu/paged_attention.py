"""`paged_attention` on TPU: ragged queries over KV in a pool's blocks, through Mosaic.

The contract is that of `pallas_kernels.paged_attention.paged_attention`; also, a block's slots must
lie inside the pool, filled or not, since a block is fetched whole.

A step of the grid takes a tile of rows and walks over its visits (`pallas_kernels.visits`). A
visit's keys come in chunks, one copy for each block, two chunks deep, and the next chunk may be the
next tile's, so that copies never pause. Entries of the table come the same way, one chunk earlier:
tables of a million tokens have no place in scalar memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.paged_attention import RowTables
from pallas_kernels.partials import Partial
from pallas_kernels.softmax import LN_2, Scores, fold_scores, precision_of
from pallas_kernels.visits import visits

_LANES = 128
_CHUNK_BYTES = 1 << 18  # of K, which one chunk of keys should have at least
_MOST_KEYS = 512
_NOWHERE = 2**30  # position of what is no key


def entries_at_once(block_size: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Table entries of a chunk: enough bytes for a copy to be worth its start."""
    keys = _CHUNK_BYTES // (kv_heads * head_dim * itemsize)
    keys = min(_MOST_KEYS, max(_LANES, keys))
    return max(1, min(_LANES, keys // block_size))


def pack_table(table_Nx3: Int32[Array, "N 3"]) -> Int32[Array, "3 M 1 128"]:
    """The table as kernels fetch it: slots, positions and counts, each in rows of lanes.

    One row more than is filled: a chunk of entries may cross from one row to the next.
    """
    filled = pl.cdiv(table_Nx3.shape[0], _LANES)
    room = (filled + 1) * _LANES - table_Nx3.shape[0]
    return jnp.pad(table_Nx3.T, ((0, 0), (0, room))).reshape(3, filled + 1, 1, _LANES)


def paged_attention(
    q_RxHxD: Float[Array, "R H D"],
    k_pool: Shaped[Array, "L S G D"],
    v_pool: Shaped[Array, "L S G D"],
    rows: RowTables,
    *,
    layer: int | Int32[Array, ""],
    block_size: int,
    scale: float,
    soft_cap: float | None = None,
    rows_at_once: int = 1,
    decode: Callable[[Array], Array] = lambda x: x,
    interpret: Any = False,
) -> Partial:
    """Attends each row's query over the row's entries; returns `(o_RxHxD, lse_RxH)`.

    `rows_at_once`: neighbouring rows that are worth taking together, since they share their
    entries. The result does not depend on it. Work: 4*H*D flops and 2*G*D stored elements per
    KV token and tile of rows.
    """
    real, heads, head_dim = q_RxHxD.shape
    kv_heads, itemsize = k_pool.shape[2], k_pool.dtype.itemsize
    group, tile = heads // kv_heads, rows_at_once
    room = -real % tile
    q_RxHxD = jnp.pad(q_RxHxD, ((0, room), (0, 0), (0, 0)))
    rows = rows._replace(
        **{name: jnp.pad(getattr(rows, name), (0, room)) for name in RowTables._fields[1:]}
    )
    tiles, queries = (real + room) // tile, tile * group
    entries = entries_at_once(block_size, kv_heads, head_dim, itemsize)
    keys = entries * block_size
    found = visits(rows, tile)
    limits_Rx3 = jnp.stack([found.visit_R, rows.first_R, rows.position_R], axis=1)
    listed = rows.table_Nx3.shape[0] * block_size  # more keys than that no row can name
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def of_tile(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda i, *scalars: (i, *(0 for _ in shape)))

    o, lse = pl.pallas_call(
        partial(
            _kernel,
            scores=Scores(scale, soft_cap),
            entries=entries,
            block_size=block_size,
            decode=decode,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(tiles,),
            in_specs=[
                *(of_tile(queries, 3), of_tile(kv_heads, queries, head_dim)),
                *(anywhere, anywhere, anywhere),
            ],
            out_specs=[of_tile(kv_heads, queries, head_dim), of_tile(kv_heads, queries, 1)],
            scratch_shapes=[
                pltpu.VMEM((2, keys, kv_heads, head_dim), k_pool.dtype),
                pltpu.VMEM((2, keys, kv_heads, head_dim), v_pool.dtype),
                pltpu.VMEM((kv_heads, queries, 1), jnp.float32),
                pltpu.VMEM((kv_heads, queries, 1), jnp.float32),
                pltpu.VMEM((kv_heads, queries, head_dim), jnp.float32),
                pltpu.SMEM((3, 3, 2, 1, _LANES), jnp.int32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((3,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tiles, kv_heads, queries, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((tiles, kv_heads, queries, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * listed * heads * head_dim * tile,
            transcendentals=listed * heads * tile,
            bytes_accessed=2 * listed * kv_heads * head_dim * itemsize
            + real * heads * head_dim * (itemsize + 4),
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        *found[:3],
        jnp.repeat(limits_Rx3, group, axis=0).reshape(tiles, queries, 3),
        _by_kv_head(q_RxHxD, tile, kv_heads),
        pack_table(rows.table_Nx3),
        k_pool,
        v_pool,
    )
    return Partial(_by_row(o, tile)[:real], _by_row(lse, tile)[:real, :, 0])


def _by_kv_head(x_RxHxD: Array, tile: int, kv_heads: int) -> Array:
    """`[tiles, G, tile * H / G, D]`: the queries of a KV head behind each other."""
    count, heads, size = x_RxHxD.shape
    x = x_RxHxD.reshape(count // tile, tile, kv_heads, heads // kv_heads, size)
    return x.swapaxes(1, 2).reshape(count // tile, kv_heads, -1, size)


def _by_row(x: Array, tile: int) -> Array:
    """Undoes `_by_kv_head`: `[R, H, D]`."""
    tiles, kv_heads, queries, size = x.shape
    x = x.reshape(tiles, kv_heads, tile, queries // tile, size)
    return x.swapaxes(1, 2).reshape(tiles * tile, -1, size)


class _Item(NamedTuple):
    """A chunk of a visit's keys."""

    visit: jax.Array
    chunk: jax.Array


class _Fetch(NamedTuple):
    """Brings table entries and keys into buffers; holds the refs that it takes."""

    layer_ref: Any
    begin_ref: Any
    start_ref: Any
    entries_ref: Any
    table_ref: Any
    pools: tuple[Any, Any]
    buffers: tuple[Any, Any]
    table_buffer: Any
    key_semaphore: Any
    table_semaphore: Any
    entries: int
    block_size: int

    def chunks(self, visit: jax.Array) -> jax.Array:
        return lax.div(self.entries_ref[visit] + self.entries - 1, self.entries)

    def exists(self, item: _Item) -> jax.Array:
        return item.visit < self.begin_ref[self.begin_ref.shape[0] - 1]

    def after(self, item: _Item) -> _Item:
        ends = item.chunk + 1 >= self.chunks(item.visit)
        return _Item(
            jnp.where(ends, item.visit + 1, item.visit), jnp.where(ends, 0, item.chunk + 1)
        )

    def first_entry(self, item: _Item) -> jax.Array:
        return self.start_ref[item.visit] + item.chunk * self.entries

    def listed(self, item: _Item) -> jax.Array:
        return jnp.minimum(self.entries, self.entries_ref[item.visit] - item.chunk * self.entries)

    def table_copy(self, item: _Item, at: jax.Array) -> Any:
        row = lax.div(self.first_entry(item), _LANES)
        at = lax.rem(at, 3)
        return pltpu.make_async_copy(
            self.table_ref.at[:, pl.ds(row, 2)],
            self.table_buffer.at[at],
            self.table_semaphore.at[at],
        )

    def entry(self, item: _Item, at: jax.Array, e: jax.Array) -> tuple[jax.Array, ...]:
        """Slot, position and count of entry e of a chunk whose table is here."""
        place = lax.rem(self.first_entry(item), _LANES) + e
        row, lane = lax.div(place, _LANES), lax.rem(place, _LANES)
        buffer = self.table_buffer
        return tuple(buffer[lax.rem(at, 3), i, row, 0, lane] for i in range(3))

    def each_block(self, item: _Item, at: jax.Array, act: Callable[[Any], None]) -> None:
        """Does something to the copies of a chunk's blocks."""
        half = lax.rem(at, 2)

        def of_entry(e: jax.Array, _: None) -> None:
            slot = self.entry(item, at, e)[0]
            for pool, buffer in zip(self.pools, self.buffers, strict=True):
                act(
                    pltpu.make_async_copy(
                        pool.at[self.layer_ref[0], pl.ds(slot, self.block_size)],
                        buffer.at[half, pl.ds(e * self.block_size, self.block_size)],
                        self.key_semaphore.at[half],
                    )
                )

        lax.fori_loop(0, self.listed(item), of_entry, None)

    def begin(self) -> None:
        """The first chunk's keys and the second's entries are on their way afterwards."""
        first, zero = _Item(jnp.int32(0), jnp.int32(0)), jnp.int32(0)

        @pl.when(self.exists(first))
        def _() -> None:
            self.table_copy(first, zero).start()
            self.table_copy(first, zero).wait()
            self.each_block(first, zero, lambda copy: copy.start())
            second = self.after(first)

            @pl.when(self.exists(second))
            def _() -> None:
                self.table_copy(second, jnp.int32(1)).start()

    def wait(self, item: _Item, at: jax.Array) -> None:
        """Waits for chunk number `at`, after it has started what comes next."""
        later = self.after(item)

        @pl.when(self.exists(later))
        def _() -> None:
            self.table_copy(later, at + 1).wait()
            self.each_block(later, at + 1, lambda copy: copy.start())
            still_later = self.after(later)

            @pl.when(self.exists(still_later))
            def _() -> None:
                self.table_copy(still_later, at + 2).start()

        self.each_block(item, at, lambda copy: copy.wait())


def _kernel(
    layer_ref: Any,
    begin_ref: Any,
    start_ref: Any,
    entries_ref: Any,
    limits_ref: Any,
    q_ref: Any,
    table_ref: Any,
    k_pool: Any,
    v_pool: Any,
    o_ref: Any,
    lse_ref: Any,
    k_buffer: Any,
    v_buffer: Any,
    m_ref: Any,
    l_ref: Any,
    sum_ref: Any,
    table_buffer: Any,
    counter_ref: Any,
    key_semaphore: Any,
    table_semaphore: Any,
    *,
    scores: Scores,
    entries: int,
    block_size: int,
    decode: Callable[[Array], Array],
) -> None:
    fetch = _Fetch(
        *(layer_ref, begin_ref, start_ref, entries_ref, table_ref),
        *((k_pool, v_pool), (k_buffer, v_buffer), table_buffer, key_semaphore, table_semaphore),
        entries=entries,
        block_size=block_size,
    )
    tile = pl.program_id(0)

    @pl.when(tile == 0)
    def begin() -> None:
        counter_ref[0] = 0
        fetch.begin()

    m_ref[...] = jnp.full(m_ref.shape, -jnp.inf, jnp.float32)
    l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    limits_Qx3 = limits_ref[0]
    visit_Qx1, first_Qx1, position_Qx1 = (limits_Qx3[:, i : i + 1] for i in range(3))

    def fold_chunk(item: _Item, at: jax.Array) -> None:
        half = lax.rem(at, 2)
        key_1xK = _key_positions(fetch, item, at, v_buffer.at[half])
        visible_QxK = (key_1xK < position_Qx1) & (key_1xK >= first_Qx1)
        visible_QxK &= visit_Qx1 == item.visit
        dot = partial(
            lax.dot_general,
            precision=precision_of(q_ref.dtype),
            preferred_element_type=jnp.float32,
        )
        for g in range(q_ref.shape[1]):
            k_KxD, v_KxD = (
                decode(buffer[half, :, g, :]).astype(q_ref.dtype) for buffer in fetch.buffers
            )
            s_QxK = scores.of(dot(q_ref[0, g], k_KxD, (((1,), (1,)), ((), ()))))
            weights = fold_scores(m_ref[g], jnp.where(visible_QxK, s_QxK, -jnp.inf), axis=1)
            pv_QxD = dot(weights.p.astype(v_KxD.dtype), v_KxD, (((1,), (0,)), ((), ())))
            m_ref[g] = weights.m
            l_ref[g] = l_ref[g] * weights.shrink + weights.p.sum(1, keepdims=True)
            sum_ref[g] = sum_ref[g] * weights.shrink + pv_QxD

    def fold_visit(visit: jax.Array, _: None) -> None:
        def chunk(c: jax.Array, _: None) -> None:
            item, at = _Item(visit, c), counter_ref[0]
            fetch.wait(item, at)
            fold_chunk(item, at)
            counter_ref[0] = at + 1

        lax.fori_loop(0, fetch.chunks(visit), chunk, None)

    lax.fori_loop(begin_ref[tile], begin_ref[tile + 1], fold_visit, None)
    l_GxQx1 = l_ref[...]
    seen_GxQx1 = l_GxQx1 > 0
    divisor_GxQx1 = jnp.where(seen_GxQx1, l_GxQx1, 1.0)
    o_ref[0] = sum_ref[...] / divisor_GxQx1
    lse_GxQx1 = m_ref[...] * LN_2 + jnp.log(divisor_GxQx1)
    lse_ref[0] = jnp.where(seen_GxQx1, lse_GxQx1, -jnp.inf)


def _key_positions(fetch: _Fetch, item: _Item, at: jax.Array, v_KxGxD: Any) -> jax.Array:
    """`[1, K]`, the position of each key of a chunk, `_NOWHERE` where there is none.

    There, V becomes 0: it may be NaN, whose product with a weight of 0 is NaN.
    """
    size = fetch.block_size
    keys = fetch.entries * size
    lane_1xK = lax.broadcasted_iota(jnp.int32, (1, keys), 1)
    offset_Bx1x1 = lax.broadcasted_iota(jnp.int32, (size, 1, 1), 0)

    def of_entry(e: jax.Array, key_1xK: jax.Array) -> jax.Array:
        position, count = fetch.entry(item, at, e)[1:]
        filled = jnp.where(e < fetch.listed(item), count, 0)
        block = pl.ds(e * size, size)

        @pl.when(filled < size)
        def _() -> None:
            v_KxGxD[block] = jnp.where(
                offset_Bx1x1 < filled, v_KxGxD[block], jnp.zeros((), v_KxGxD.dtype)
            )

        offset_1xK = lane_1xK - e * size
        here_1xK = (offset_1xK >= 0) & (offset_1xK < filled)
        return jnp.where(here_1xK, position + offset_1xK, key_1xK)

    return lax.fori_loop(0, fetch.entries, of_entry, jnp.full((1, keys), _NOWHERE, jnp.int32))
