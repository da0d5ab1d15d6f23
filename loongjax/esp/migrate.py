"""Moving KV between instances: the body of a migrate program, on one rank.

Rank r sends to the rank `hop` places on, for every hop at once round the group; tokens go in
tiles, as many as a hop needs. What a rank has nothing to do for, it fills with the trash slot.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from loongjax.cluster.mesh import SP
from loongjax.esp.meta import Meta
from loongjax.kvcache.pool import KVPool
from pallas_kernels.backends import Kernels

TILE = 64  # tokens of one message: all layers, K and V together


def migrate(
    pool: KVPool, meta: Meta, *, degree: int, kernels: Kernels
) -> tuple[KVPool, Int32[Array, "1 1"]]:
    """Sends `send[hop]` slots and stores what arrives in `receive[hop]`; see `meta_layout`.

    Every slot is read before any is written over: a step's new slots are none of its old ones.
    """
    for hop in range(1, degree):
        ring = [(rank, (rank + hop) % degree) for rank in range(degree)]
        send, receive = meta["send"][hop - 1], meta["receive"][hop - 1]

        def tile(
            i: Array,
            pool: KVPool,
            ring: list[tuple[int, int]] = ring,
            send: Array = send,
            receive: Array = receive,
        ) -> KVPool:
            taken = lax.dynamic_slice_in_dim(send, i * TILE, TILE)
            given = lax.dynamic_slice_in_dim(receive, i * TILE, TILE)
            leaving = jnp.stack(
                [leaf.at[:, taken].get(mode="promise_in_bounds") for leaf in (pool.k, pool.v)]
            )
            arrived_2xLxTxGxD = lax.ppermute(leaving, SP, ring)

            def store(layer: Array, pool: KVPool) -> KVPool:
                rows = arrived_2xLxTxGxD[:, layer]
                return pool._replace(
                    k=kernels.kv_write(pool.k, rows[0], given, layer=layer),
                    v=kernels.kv_write(pool.v, rows[1], given, layer=layer),
                )

            return lax.fori_loop(0, pool.k.shape[0], store, pool)

        pool = lax.fori_loop(0, meta["trips"][hop - 1], tile, pool)
    return pool, jnp.zeros((1, 1), jnp.int32)
