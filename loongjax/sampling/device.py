"""The next token from logits, on the device.

Gumbel-max (the largest of logit / temperature + Gumbel noise is a draw from the softmax),
with noise keyed by (seed, sample, position): a token does not depend on the batch it was drawn in.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32


def sample(
    logits_RxV: Float32[Array, "R V"],
    temperature_R: Float32[Array, " R"],
    seed_R: Int32[Array, " R"],
    sample_R: Int32[Array, " R"],
    position_R: Int32[Array, " R"],
) -> Int32[Array, " R"]:
    """One token for each row; temperature 0 takes the most likely one.

    `sample_R` tells the answers to one prompt apart. `position_R` is the position that the new
    token will have. If no row has a temperature,
    no noise is drawn: a branch on a scalar, so one program serves both.
    """
    greedy_R = jnp.argmax(logits_RxV, axis=-1).astype(jnp.int32)

    def draw() -> Int32[Array, " R"]:
        def noise(seed: Array, sample: Array, position: Array) -> Float32[Array, " V"]:
            key = jax.random.fold_in(jax.random.key(seed), sample)
            key = jax.random.fold_in(key, position)
            return jax.random.gumbel(key, logits_RxV.shape[-1:], jnp.float32)

        divisor_R = jnp.where(temperature_R > 0, temperature_R, 1.0)
        # From the largest down: logits over a tiny temperature overflow, and all look alike.
        below_RxV = logits_RxV - logits_RxV.max(-1, keepdims=True)
        noisy_RxV = below_RxV / divisor_R[:, None] + jax.vmap(noise)(seed_R, sample_R, position_R)
        drawn_R = jnp.argmax(noisy_RxV, axis=-1).astype(jnp.int32)
        return jnp.where(temperature_R > 0, drawn_R, greedy_R)

    return lax.cond((temperature_R > 0).any(), draw, lambda: greedy_R)
