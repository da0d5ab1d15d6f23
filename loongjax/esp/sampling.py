"""From hidden states to tokens: the end of every program."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from loongjax.esp.meta import Meta
from loongjax.models.decoder import Decoder
from loongjax.sampling.device import Rows, sample
from loongjax.sampling.fields import FLOATS, INTS, SAID
from loongjax.sampling.scores import score

_SCORED_AT_ONCE = 16  # prompt tokens: their logits are all that stands in memory


def sample_rows(
    weights: dict,
    x_RxM: Float[Array, "R M"],
    meta: Meta,
    table_Rx2xV: Int32[Array, "R 2 V"],
    added_RxN: Int32[Array, "R N"],
    decoder: Decoder,
    *,
    tile_rows: int,
) -> Int32[Array, "R S"]:
    """Samples a token from each of the first `rows_used` rows; the others give 0.

    Rows are taken in tiles, only as many as are used: a prefill step has room for many rows
    and samples few. Each tile reads the whole unembedding.

    `table_Rx2xV` are the rows' sampling tables, `added_RxN` generated tokens that those lack, or
    -1; for each row comes back what is said of its token (`loongjax.sampling.fields.SAID`).
    """

    def tile(i: Array, said_RxS: Int32[Array, "R S"]) -> Int32[Array, "R S"]:
        def part(values: Array) -> Array:
            return lax.dynamic_slice_in_dim(values, i * tile_rows, tile_rows)

        logits = decoder.apply({"params": weights}, part(x_RxM), method="logits")
        rows = Rows(
            **{name: lax.bitcast_convert_type(part(meta[name]), jnp.float32) for name in FLOATS},
            **{name: part(meta[name]) for name in INTS},
            position=part(meta["sample_position"]),
            added=part(added_RxN),
        )
        found = sample(logits, rows, lambda: part(table_Rx2xV))
        return lax.dynamic_update_slice_in_dim(said_RxS, found, i * tile_rows, axis=0)

    tiles = (meta["rows_used"] + tile_rows - 1) // tile_rows
    return lax.fori_loop(0, tiles, tile, jnp.zeros((len(x_RxM), SAID), jnp.int32))


def score_prompt(
    weights: dict, x_TxM: Float[Array, "T M"], meta: Meta, decoder: Decoder
) -> Int32[Array, "T N"]:
    """What is said of the prompt token after each local one: `SAID` without the token.

    Computed in tiles from `score_begin` to `score_end`; elsewhere it is 0, or means nothing.
    """
    tile_rows = min(_SCORED_AT_ONCE, len(x_TxM))
    last = len(x_TxM) - tile_rows

    def tile(i: Array, said_TxS: Int32[Array, "T N"]) -> Int32[Array, "T N"]:
        at = jnp.minimum(meta["score_begin"] + i * tile_rows, last)
        x_RxM = lax.dynamic_slice_in_dim(x_TxM, at, tile_rows)
        target_R = lax.dynamic_slice_in_dim(meta["target"], at, tile_rows)
        logits = decoder.apply({"params": weights}, x_RxM, method="logits")
        return lax.dynamic_update_slice_in_dim(said_TxS, score(logits, target_R), at, axis=0)

    tiles = (meta["score_end"] - meta["score_begin"] + tile_rows - 1) // tile_rows
    return lax.fori_loop(0, tiles, tile, jnp.zeros((len(x_TxM), SAID - 1), jnp.int32))
