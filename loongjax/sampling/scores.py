"""Log-probabilities: of the chosen token, and of the most likely ones."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp
from jaxtyping import Array, Float32, Int32

from loongjax.sampling.fields import MAX_LOGPROBS


def score(logits_RxV: Float32[Array, "R V"], token_R: Int32[Array, " R"]) -> Int32[Array, "R N"]:
    """What is said of each row's token, itself left out: see `loongjax.sampling.fields.SAID`.

    Equally likely tokens have the rank of the first of them. A vocabulary of less than
    `MAX_LOGPROBS` is filled up with token 0 at minus infinity.
    """
    total_R = logsumexp(logits_RxV, axis=-1)
    own_R1 = jnp.take_along_axis(logits_RxV, token_R[:, None], axis=1)
    rank_R1 = 1 + (logits_RxV > own_R1).sum(-1, keepdims=True, dtype=jnp.int32)
    count = min(MAX_LOGPROBS, logits_RxV.shape[1])
    top_RxK, id_RxK = lax.top_k(logits_RxV, count)
    fill = ((0, 0), (0, MAX_LOGPROBS - count))
    top_RxK = jnp.pad(top_RxK - total_R[:, None], fill, constant_values=-jnp.inf)
    id_RxK = jnp.pad(id_RxK, fill)
    return jnp.concatenate([_bits(own_R1 - total_R[:, None]), rank_R1, id_RxK, _bits(top_RxK)], 1)


def _bits(value: Float32[Array, "R K"]) -> Int32[Array, "R K"]:
    return lax.bitcast_convert_type(value, jnp.int32)
