"""A chunk's attention to the KV that its requests have in the pool already, on one rank.

The history of a request may lie on any of the group's instances, in any order. Two ways
lead to the same numbers:

  pass-Q   queries go to the keys: a tile of queries is gathered from all ranks, each rank
           attends it to its own keys, and the partial results go back.
  pass-KV  keys go to the queries: a tile of keys is gathered from all ranks, and each rank
           attends its own queries to it.

The host picks the one that moves fewer bytes (`history_trips`). Both are loops with run-time
trip counts, so one program serves both, and history of any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from loongjax.cluster.mesh import SP
from loongjax.esp.meta import Meta
from loongjax.esp.partials import return_to_masters
from loongjax.kvcache.pool import KVPool, from_stored
from pallas_kernels.backends import Kernels
from pallas_kernels.paged_attention import Keys, RowTables, load_keys
from pallas_kernels.partials import (
    Carry,
    Partial,
    empty_carry,
    finish,
    fold_keys,
    fold_partial,
    put_carry,
    slice_carry,
)
from pallas_kernels.striped_attention import tile_size

Window = int | Int32[Array, ""] | None
_ROWS_AT_ONCE = 64  # queries that a kernel attends to the same keys
# Keys of one work item. On CPU, 512 keys for 256 queries are 1.8 times as fast as 128. A tile of
# queries from all ranks is as many times larger, and its scores are to stay in the cache.
_ITEM_TOKENS = 512
_LEAST_ITEM_TOKENS = 128


def item_entries(block_size: int, degree: int) -> int:
    """Table entries of one work item."""
    return max(_LEAST_ITEM_TOKENS, _ITEM_TOKENS // degree) // block_size or 1


class Trips(NamedTuple):
    """Trips of the pass-Q loop and of the pass-KV loop; at least one of them is 0."""

    query: int
    key: int


def history_trips(
    *,
    tokens: int,
    bucket: int,
    items: int,
    item_tokens: int,
    query_bytes: int,
    key_bytes: int,
    passes_keys: bool = True,
) -> Trips:
    """Which way a step takes, by the bytes that each rank receives from each other.

    `tokens` are the new tokens of each rank, in a program of `bucket`; `items` the work items
    of the rank with most history, of `item_tokens` keys each. A query moves `query_bytes`
    (q there, o and lse back), a key `key_bytes`. `passes_keys`: whether the program has both ways.
    """
    cheaper = tokens * query_bytes < items * item_tokens * key_bytes
    if cheaper or (items and not passes_keys):
        return Trips(query=-(-tokens // tile_size(bucket)), key=0)
    return Trips(query=0, key=items)


@dataclass(frozen=True, kw_only=True)
class HistoryAttention:
    """Folds the history of a step's chunks into a running softmax.

    `meta` has, for each chunk: `chunk_begin` and `chunk_end`, its interval of local tokens,
    `chunk_start`, its first position, and `history_start`, `history_entries`, where its
    history stands in this rank's table. A chunk without history has no entries anywhere.
    """

    degree: int
    block_size: int
    meta: Meta
    kernels: Kernels

    def __call__(
        self,
        carry_HxT: Carry,
        q_HxTxD: Float[Array, "H T D"],
        pool: KVPool,
        layer: int | Int32[Array, ""],
        window: Window,
    ) -> Carry:
        """The carry with all history folded in."""
        carry_HxT = self._pass_queries(carry_HxT, q_HxTxD, pool, layer, window)
        if self.kernels.shares_keys:
            # The other way's gathers want the pool in another layout: XLA would copy all of it.
            return carry_HxT
        return self._pass_keys(carry_HxT, q_HxTxD, pool, layer, window)

    def _pass_queries(
        self,
        carry_HxT: Carry,
        q_HxTxD: Float[Array, "H T D"],
        pool: KVPool,
        layer: int | Int32[Array, ""],
        window: Window,
    ) -> Carry:
        tile = tile_size(q_HxTxD.shape[1])

        def query_tile(i: Array, carry: Carry) -> Carry:
            at = i * tile
            q_HxQxD = lax.dynamic_slice_in_dim(q_HxTxD, at, tile, axis=1)
            if self.degree > 1:  # rank-major: all ranks' queries with local indices at, at + 1, …
                q_HxQxD = lax.all_gather(q_HxQxD, SP, axis=1, tiled=True)
            local_Q = at + jnp.tile(jnp.arange(tile, dtype=jnp.int32), self.degree)
            rank_Q = jnp.repeat(jnp.arange(self.degree, dtype=jnp.int32), tile)
            if self.kernels.shares_keys:
                partial = self._attend_at_once(q_HxQxD, pool, local_Q, rank_Q, layer, window)
            else:
                partial = self._attend_by_chunk(q_HxQxD, pool, local_Q, rank_Q, layer, window, at)
            o, lse = return_to_masters(partial, self.degree)
            running = slice_carry(carry, at, tile)
            for rank in range(self.degree):
                returned = Partial(o[rank].swapaxes(0, 1), lse[rank].swapaxes(0, 1))
                running = fold_partial(running, returned)
            return put_carry(carry, running, at)

        return lax.fori_loop(0, self.meta["query_trips"], query_tile, carry_HxT)

    def _attend_at_once(
        self,
        q_HxQxD: Float[Array, "H Q D"],
        pool: KVPool,
        local_Q: Int32[Array, " Q"],
        rank_Q: Int32[Array, " Q"],
        layer: int | Int32[Array, ""],
        window: Window,
    ) -> Partial:
        """A tile's queries, in rows, against the keys that this rank holds of their chunks."""
        chunk_Q = jnp.sum(self.meta["chunk_end"][:, None] <= local_Q, axis=0, dtype=jnp.int32)
        chunk_Q = jnp.minimum(chunk_Q, self.meta["chunk_end"].shape[0] - 1)
        begin_Q, start_Q = self.meta["chunk_begin"][chunk_Q], self.meta["chunk_start"][chunk_Q]
        inside_Q = (local_Q >= begin_Q) & (local_Q < self.meta["chunk_end"][chunk_Q])
        first_Q = jnp.zeros_like(start_Q)
        if window is not None:
            first_Q = start_Q + rank_Q + self.degree * (local_Q - begin_Q) - window + 1
        return self.kernels.paged_attention(
            q_HxQxD.swapaxes(0, 1),
            pool.k,
            pool.v,
            RowTables(
                table_Nx3=pool.table,
                start_R=self.meta["history_start"][chunk_Q],
                entries_R=jnp.where(inside_Q, self.meta["history_entries"][chunk_Q], 0),
                # The pool may hold tokens of this very chunk: they were kept in ring steps.
                position_R=start_Q,
                first_R=first_Q,
            ),
            layer=layer,
            block_size=self.block_size,
            scale=q_HxQxD.shape[2] ** -0.5,
            rows_at_once=min(_ROWS_AT_ONCE, q_HxQxD.shape[1] // self.degree),
            decode=from_stored,
        )

    def _attend_by_chunk(
        self,
        q_HxQxD: Float[Array, "H Q D"],
        pool: KVPool,
        local_Q: Int32[Array, " Q"],
        rank_Q: Int32[Array, " Q"],
        layer: int | Int32[Array, ""],
        window: Window,
        at: Int32[Array, ""],
    ) -> Partial:
        """The same in loops over chunks and their work items, for tiles from `at` on."""
        heads, queries, head_dim = q_HxQxD.shape
        first_chunk = jnp.sum(self.meta["chunk_end"] <= at, dtype=jnp.int32)
        tile_end = at + queries // self.degree
        last_chunk = jnp.sum(self.meta["chunk_begin"] < tile_end, dtype=jnp.int32)

        def chunk_keys(c: Array, partial: Carry) -> Carry:
            def work_item(j: Array, running: Carry) -> Carry:
                keys = self._load(pool, c, j, layer)
                visible = self._visible(keys, c, local_Q, rank_Q, window)
                return self._fold(running, q_HxQxD, keys, visible)

            return lax.fori_loop(0, self._work_items()[c], work_item, partial)

        nothing = empty_carry((heads, queries), head_dim)
        partial = finish(lax.fori_loop(first_chunk, last_chunk, chunk_keys, nothing))
        return Partial(partial.o.swapaxes(0, 1), partial.lse.swapaxes(0, 1))

    def _pass_keys(
        self,
        carry_HxT: Carry,
        q_HxTxD: Float[Array, "H T D"],
        pool: KVPool,
        layer: int | Int32[Array, ""],
        window: Window,
    ) -> Carry:
        tile = tile_size(q_HxTxD.shape[1])
        ends_C = jnp.cumsum(self._work_items())
        rank = lax.axis_index(SP) if self.degree > 1 else jnp.int32(0)

        def work_item(w: Array, carry: Carry) -> Carry:
            # Ranks have different numbers of items; beyond its last, a rank sends no valid key.
            mine = jnp.minimum(w, ends_C[-1] - 1)
            c = jnp.sum(ends_C <= mine, dtype=jnp.int32)
            keys = self._load(pool, c, mine - (ends_C[c] - self._work_items()[c]), layer)
            keys_n = keys._replace(valid_WxK=keys.valid_WxK & (w < ends_C[-1]))
            c_n = c[None]
            if self.degree > 1:
                c_n = lax.all_gather(c, SP)
                keys_n = Keys(*(lax.all_gather(leaf, SP, tiled=True) for leaf in keys_n))

            def arrived(source: Array, carry: Carry) -> Carry:
                keys = Keys(*(lax.dynamic_slice_in_dim(leaf, source, 1) for leaf in keys_n))
                return self._fold_arrived(carry, q_HxTxD, keys, c_n[source], rank, tile, window)

            return lax.fori_loop(0, self.degree, arrived, carry)

        return lax.fori_loop(0, self.meta["key_trips"], work_item, carry_HxT)

    def _fold_arrived(
        self,
        carry_HxT: Carry,
        q_HxTxD: Float[Array, "H T D"],
        keys: Keys,
        c: Int32[Array, ""],
        rank: Int32[Array, ""],
        tile: int,
        window: Window,
    ) -> Carry:
        """Folds a tile of chunk c's keys into this rank's queries of that chunk."""

        def query_tile(i: Array, carry: Carry) -> Carry:
            at = i * tile
            local_Q = at + jnp.arange(tile, dtype=jnp.int32)
            visible = self._visible(keys, c, local_Q, jnp.full(tile, rank), window)
            q_HxQxD = lax.dynamic_slice_in_dim(q_HxTxD, at, tile, axis=1)
            running = self._fold(slice_carry(carry, at, tile), q_HxQxD, keys, visible)
            return put_carry(carry, running, at)

        begin, end = self.meta["chunk_begin"][c], self.meta["chunk_end"][c]
        first, last = begin // tile, (end + tile - 1) // tile
        return lax.fori_loop(
            first, jnp.where(keys.valid_WxK.any(), last, first), query_tile, carry_HxT
        )

    def _work_items(self) -> Int32[Array, " C"]:
        step = item_entries(self.block_size, self.degree)
        return (self.meta["history_entries"] + step - 1) // step

    def _load(
        self, pool: KVPool, c: Int32[Array, ""], item: Int32[Array, ""], layer: int | Array
    ) -> Keys:
        """The keys of one work item of chunk c, as the only one of a batch."""
        entries = item_entries(self.block_size, self.degree)
        first = item * entries
        return load_keys(
            pool.k,
            pool.v,
            pool.table,
            (self.meta["history_start"][c] + first)[None],
            (self.meta["history_entries"][c] - first)[None],
            entries=entries,
            layer=layer,
            block_size=self.block_size,
            decode=from_stored,
        )

    def _visible(
        self,
        keys: Keys,
        c: Int32[Array, ""],
        local_Q: Int32[Array, " Q"],
        rank_Q: Int32[Array, " Q"],
        window: Window,
    ) -> Bool[Array, "Q K"]:
        """All of its history is visible to a chunk's query, save what its window hides."""
        begin, start = self.meta["chunk_begin"][c], self.meta["chunk_start"][c]
        in_chunk = (local_Q >= begin) & (local_Q < self.meta["chunk_end"][c])
        # The pool may hold tokens of this very chunk: they were kept in layers' ring steps.
        visible = in_chunk[:, None] & (keys.valid_WxK[0] & (keys.position_WxK[0] < start))
        if window is None:
            return visible
        position_Q = start + rank_Q + self.degree * (local_Q - begin)
        return visible & (keys.position_WxK[0] > (position_Q - window)[:, None])

    def _fold(
        self,
        running: Carry,
        q_HxQxD: Float[Array, "H Q D"],
        keys: Keys,
        visible_QxK: Bool[Array, "Q K"],
    ) -> Carry:
        head_dim = q_HxQxD.shape[2]

        def by_head(x_WxKxX: Array) -> Array:
            x_KxGxD = x_WxKxX[0].reshape(x_WxKxX.shape[1], -1, head_dim)
            return x_KxGxD.swapaxes(0, 1).astype(q_HxQxD.dtype)

        k, v = by_head(keys.k_WxKxX), by_head(keys.v_WxKxX)
        return fold_keys(running, q_HxQxD, k, v, visible_QxK, head_dim**-0.5)
