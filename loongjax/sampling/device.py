"""The next token from logits, on the device.

Gumbel-max (the largest of logit / temperature + Gumbel noise is a draw from the softmax), with
noise keyed by (seed, sample, position): a token does not depend on the batch it was drawn in.
What only some rows ask for stands behind branches on a scalar, so one program serves all, and
steps in which nobody asks do not pay for it.

In order: bias and forbidden tokens, repetition penalty, frequency and presence penalty, end tokens
that come too early; then, where there is a temperature, top_k, top_p and min_p of what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from loongjax.sampling.cut import cut
from loongjax.sampling.fields import COUNT, END, PROMPT, SAID
from loongjax.sampling.scores import score

Tables: TypeAlias = Callable[[], Int32[Array, "R 2 V"]]
"""Gives the rows' tables (`loongjax.sampling.fields`); called in the branch that reads them."""


class Rows(NamedTuple):
    """How each row's token is chosen: see `loongjax.sampling.fields.FIELDS`.

    Attributes:
      position: The position that the new token will have.
      added: Generated tokens that the rows' tables do not have yet; -1: none.
    """

    temperature: Float32[Array, " R"]
    top_p: Float32[Array, " R"]
    min_p: Float32[Array, " R"]
    repetition: Float32[Array, " R"]
    presence: Float32[Array, " R"]
    frequency: Float32[Array, " R"]
    seed: Int32[Array, " R"]
    sample: Int32[Array, " R"]
    top_k: Int32[Array, " R"]
    first_end: Int32[Array, " R"]
    is_noted: Int32[Array, " R"]
    is_cut: Int32[Array, " R"]
    is_scored: Int32[Array, " R"]
    position: Int32[Array, " R"]
    added: Int32[Array, "R N"]


def sample(logits_RxV: Float32[Array, "R V"], rows: Rows, tables: Tables) -> Int32[Array, "R S"]:
    """One token for each row, and what is said of it (`loongjax.sampling.fields.SAID`).

    At temperature 0 it is the most likely one. Log-probabilities are those of the model: of the
    logits as they came.
    """
    token_R = lax.cond(
        rows.is_noted.any(),
        lambda: _choose(shape(logits_RxV, rows, tables()), rows),
        lambda: _choose(logits_RxV, rows),
    )
    said_RxS = lax.cond(
        rows.is_scored.any(),
        lambda: score(logits_RxV, token_R),
        lambda: jnp.zeros((len(token_R), SAID - 1), jnp.int32),
    )
    return jnp.concatenate([token_R[:, None], said_RxS], axis=1)


def shape(
    logits_RxV: Float32[Array, "R V"], rows: Rows, table_Rx2xV: Int32[Array, "R 2 V"]
) -> Float32[Array, "R V"]:
    """Logits with bias, penalties and forbidden tokens. Rows whose table is 0 stay as they are."""
    each_R = jnp.arange(len(logits_RxV))[:, None]
    note_RxV = table_Rx2xV[:, 0]
    new_RxN = (rows.added >= 0).astype(jnp.int32)
    count_RxV = (note_RxV & COUNT).at[each_R, jnp.maximum(rows.added, 0)].add(new_RxN)
    x_RxV = logits_RxV + lax.bitcast_convert_type(table_Rx2xV[:, 1], jnp.float32)
    seen_RxV = ((note_RxV & PROMPT) > 0) | (count_RxV > 0)
    factor_R1 = jnp.where(rows.repetition > 0, rows.repetition, 1.0)[:, None]
    penalised_RxV = jnp.where(x_RxV > 0, x_RxV / factor_R1, x_RxV * factor_R1)
    x_RxV = jnp.where(seen_RxV, penalised_RxV, x_RxV)
    x_RxV -= rows.frequency[:, None] * count_RxV
    x_RxV -= rows.presence[:, None] * (count_RxV > 0)
    too_early_R1 = (rows.position < rows.first_end)[:, None]
    return jnp.where(too_early_R1 & ((note_RxV & END) > 0), -jnp.inf, x_RxV)


def _choose(logits_RxV: Float32[Array, "R V"], rows: Rows) -> Int32[Array, " R"]:
    greedy_R = jnp.argmax(logits_RxV, axis=-1).astype(jnp.int32)

    def draw() -> Int32[Array, " R"]:
        def noise(seed: Array, sample: Array, position: Array) -> Float32[Array, " V"]:
            key = jax.random.fold_in(jax.random.key(seed), sample)
            key = jax.random.fold_in(key, position)
            return jax.random.gumbel(key, logits_RxV.shape[-1:], jnp.float32)

        divisor_R = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
        # From the largest down: logits over a tiny temperature overflow, and all look alike.
        below_RxV = (logits_RxV - logits_RxV.max(-1, keepdims=True)) / divisor_R[:, None]
        below_RxV = lax.cond(
            rows.is_cut.any(),
            lambda: cut(below_RxV, top_k_R=rows.top_k, top_p_R=rows.top_p, min_p_R=rows.min_p),
            lambda: below_RxV,
        )
        noisy_RxV = below_RxV + jax.vmap(noise)(rows.seed, rows.sample, rows.position)
        drawn_R = jnp.argmax(noisy_RxV, axis=-1).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, drawn_R, greedy_R)

    return lax.cond((rows.temperature > 0).any(), draw, lambda: greedy_R)
