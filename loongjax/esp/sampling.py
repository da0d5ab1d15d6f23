"""From hidden states to tokens: the end of every program."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from loongjax.esp.meta import Meta
from loongjax.models.decoder import Decoder
from loongjax.sampling.device import sample


def sample_rows(
    weights: dict, x_RxM: Float[Array, "R M"], meta: Meta, decoder: Decoder, *, tile_rows: int
) -> Int32[Array, " R"]:
    """Samples a token from each of the first `rows_used` rows; the others give 0.

    Rows are taken in tiles, only as many as are used: a prefill step has room for many rows
    and samples few. Each tile reads the whole unembedding.
    """
    rows = x_RxM.shape[0]
    temperature_R = lax.bitcast_convert_type(meta["temperature"], jnp.float32)

    def tile(i: Array, token_R: Int32[Array, " R"]) -> Int32[Array, " R"]:
        def part(values: Array) -> Array:
            return lax.dynamic_slice_in_dim(values, i * tile_rows, tile_rows)

        logits = decoder.apply({"params": weights}, part(x_RxM), method="logits")
        found = sample(
            logits,
            part(temperature_R),
            part(meta["seed"]),
            part(meta["sample"]),
            part(meta["sample_position"]),
        )
        return lax.dynamic_update_slice_in_dim(token_R, found, i * tile_rows, axis=0)

    tiles = (meta["rows_used"] + tile_rows - 1) // tile_rows
    return lax.fori_loop(0, tiles, tile, jnp.zeros(rows, jnp.int32))
