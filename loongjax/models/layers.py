"""The parts of a decoder that know nothing of attention: products, norms, MLP, vocabulary.

Owns the tensor-parallel collectives. Weights are `[out, in]`, as checkpoints store them; how
a product with one is computed is said in products.py. Under tensor parallelism each part gets
its rank's share, as Megatron cuts it: a product splits its outputs, the next one its inputs,
and one sum over the mesh axis `tp` ends the pair. With `tp == 1` no collective is emitted, so
that the parts also run outside `shard_map`.

Letters: T tokens, R rows, M width, F ffn, V vocabulary, I and O inputs and outputs.
F, V, and I or O where split, are the sizes of one rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from loongjax.models.config import ModelConfig
from loongjax.models.products import Products, linear

TP_AXIS = "tp"

# Weights are always given; the initializers only tell linen the shapes to check.
GIVEN = nn.initializers.zeros_init()


def rms_norm(
    x: Float[Array, "*rows M"], scale_M: Float[Array, " M"], eps: float
) -> Float[Array, "*rows M"]:
    """Computes x / sqrt(mean(x**2) + eps) * scale over the last axis, in float32."""
    x_f32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    normed = x_f32 * lax.rsqrt(variance + eps) * scale_M.astype(jnp.float32)
    return normed.astype(x.dtype)


def sum_over_tp(x_TxM: Float[Array, "T M"], tp: int) -> Float[Array, "T M"]:
    """The sum of the ranks' shares, in the dtype given: what a split product ends with."""
    return x_TxM if tp == 1 else lax.psum(x_TxM, TP_AXIS)


def embed(
    table_VxM: Float[Array, "V M"], tokens_T: Int[Array, " T"], tp: int
) -> Float[Array, "T M"]:
    """Rows of the embedding, found by the rank that holds them and summed over the ranks.

    A token outside the vocabulary, as padding may hold, gives some row, never NaN.
    """
    if tp == 1:
        return table_VxM.at[tokens_T].get(mode="clip")
    rows = table_VxM.shape[0]
    local_T = tokens_T - lax.axis_index(TP_AXIS) * rows
    here_T = (local_T >= 0) & (local_T < rows)
    x_TxM = table_VxM.at[local_T].get(mode="clip")
    return sum_over_tp(jnp.where(here_T[:, None], x_TxM, 0), tp)


def unembed(
    x_RxM: Float[Array, "R M"],
    table_VxM: Float[Array, "V M"],
    vocab_size: int,
    tp: int,
    products: Products,
) -> Float[Array, "R {tp}*V"]:
    """float32 logits of the whole vocabulary on every rank; those of padded rows are -inf."""
    logits_RxV = linear(x_RxM, table_VxM, jnp.float32, products=products)
    if tp == 1:
        return logits_RxV
    logits_RxV = lax.all_gather(logits_RxV, TP_AXIS, axis=1, tiled=True, to="invarying")
    return jnp.where(jnp.arange(logits_RxV.shape[1]) < vocab_size, logits_RxV, -jnp.inf)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), F split over `tp`."""

    config: ModelConfig
    tp: int = 1
    products: Products = Products.NATIVE

    @nn.compact
    def __call__(self, x_TxM: Float[Array, "T M"]) -> Float[Array, "T M"]:
        """Applies the MLP to normed activations."""
        width, ffn = self.config.width, self.config.ffn // self.tp
        gate_TxF = self._linear(x_TxM, "gate", (ffn, width))
        up_TxF = self._linear(x_TxM, "up", (ffn, width))
        if self.config.mlp_bias:
            gate_TxF += self.param("gate_bias", GIVEN, (ffn,))
            up_TxF += self.param("up_bias", GIVEN, (ffn,))
        inner_TxF = jax.nn.silu(gate_TxF.astype(jnp.float32)) * up_TxF.astype(jnp.float32)
        y_TxM = self._linear(inner_TxF.astype(x_TxM.dtype), "down", (width, ffn))
        y_TxM = sum_over_tp(y_TxM, self.tp)
        if self.config.mlp_bias:  # after the sum: every rank holds the whole bias
            y_TxM += self.param("down_bias", GIVEN, (width,))
        return y_TxM

    def _linear(self, x_TxI: jax.Array, name: str, shape: tuple[int, int]) -> jax.Array:
        return linear(x_TxI, self.param(name, GIVEN, shape), products=self.products)
