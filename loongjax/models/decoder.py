"""The decoder of every family: embedding, layers, final norm, logits.

Owns the order of computation and nothing of where keys and values live: attention over
them is the caller's (`Attend`), and its state is threaded through the layers. Runs inside
`shard_map` over mesh axes ('sp', 'tp'), or outside it when `tp == 1`. Weights are given:

    decoder = Decoder(config, tp)
    x, state = decoder.apply({"params": weights}, tokens, positions, attend, state)
    logits = decoder.apply({"params": weights}, x[last_tokens], method="logits")

Layers may be a tuple of dicts, one for each layer and looped over in Python, or one dict of
stacked `[L, ...]` leaves, run under `lax.scan`; the result is the same. Which is faster
depends on the platform: stacked leaves are copied by the CPU compiler, and a scan keeps
programs small elsewhere.

To add a part to the layers, declare its weights here with `self.param`, describe them in
weights.py, and give `ModelConfig` a field that says which families have it.

Activations have the dtype of the weights; norms, rotation and logits are float32.
Letters: T tokens, R rows, M width, H query heads, G key and value heads, D head size,
V vocabulary, L layers. H, G and weights are the share of one `tp` rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig
from loongjax.models.layers import (
    GIVEN,
    MLP,
    embed,
    rms_norm,
    sum_over_tp,
    unembed,
)
from loongjax.models.products import Products, linear
from loongjax.models.rope import Rotation, rotate, rotation_at
from loongjax.models.weights import weight_specs

NO_WINDOW = 2**30
"""Window of a full layer where windows are traced: further than any position."""


@runtime_checkable
class Attend(Protocol):
    """Attention of new tokens over all that they may see, supplied by the parallelism."""

    def __call__(
        self,
        state: Any,
        *,
        layer: int | Int[Array, ""],
        window: int | Int[Array, ""] | None,
        q_TxHxD: Float[Array, "T H D"],
        k_TxGxD: Float[Array, "T G D"],
        v_TxGxD: Float[Array, "T G D"],
    ) -> tuple[Float[Array, "T H D"], Any]:
        """Returns (o_TxHxD, state).

        Args:
          state: Any pytree, the KV pool for one; goes in and out of every layer.
          layer: Its number, traced.
          window: Keys that a query sees [tokens, its own included]. None: all of them.
            A Python value, save under a scan over layers whose windows differ: there it
            is traced, and `NO_WINDOW` stands for None.
          q_TxHxD: Queries of the new tokens, rotated, not yet scaled by D**-0.5.
          k_TxGxD: Their keys, rotated.
          v_TxGxD: Their values.
        """
        ...


class Attention(nn.Module):
    """Projections, QK norm and rotation around an `Attend`; heads split over `tp`."""

    config: ModelConfig
    tp: int = 1
    products: Products = Products.NATIVE

    @nn.compact
    def __call__(
        self,
        x_TxM: Float[Array, "T M"],
        rotation: Rotation,
        attend: Attend,
        state: Any,
        *,
        layer: int | Int[Array, ""],
        window: int | Int[Array, ""] | None,
    ) -> tuple[Float[Array, "T M"], Any]:
        """Attends with normed activations; returns (y_TxM, state)."""
        c = self.config
        q_TxHxD = self._heads("q", x_TxM, c.heads // self.tp)
        k_TxGxD = self._heads("k", x_TxM, c.kv_heads // self.tp)
        v_TxGxD = self._heads("v", x_TxM, c.kv_heads // self.tp)
        if c.qk_norm:
            q_TxHxD = rms_norm(q_TxHxD, self.param("q_norm", GIVEN, (c.head_dim,)), c.norm_eps)
            k_TxGxD = rms_norm(k_TxGxD, self.param("k_norm", GIVEN, (c.head_dim,)), c.norm_eps)
        o_TxHxD, state = attend(
            state,
            layer=layer,
            window=window,
            q_TxHxD=rotate(q_TxHxD, *rotation),
            k_TxGxD=rotate(k_TxGxD, *rotation),
            v_TxGxD=v_TxGxD,
        )
        o_TxHD = o_TxHxD.reshape(len(x_TxM), -1).astype(x_TxM.dtype)
        o_MxHD = self.param("o", GIVEN, (c.width, o_TxHD.shape[1]))
        y_TxM = sum_over_tp(linear(o_TxHD, o_MxHD, products=self.products), self.tp)
        if c.o_bias:  # after the sum: every rank holds the whole bias
            y_TxM += self.param("o_bias", GIVEN, (c.width,))
        return y_TxM, state

    def _heads(self, name: str, x_TxM: jax.Array, heads: int) -> jax.Array:
        c = self.config
        w_HDxM = self.param(name, GIVEN, (heads * c.head_dim, c.width))
        y_TxHD = linear(x_TxM, w_HDxM, products=self.products)
        if c.qkv_bias:
            y_TxHD += self.param(f"{name}_bias", GIVEN, (heads * c.head_dim,))
        return y_TxHD.reshape(len(x_TxM), heads, c.head_dim)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream.

    All weights of a layer lie flat in one dict: the parts share its scope.
    """

    config: ModelConfig
    tp: int = 1
    products: Products = Products.NATIVE

    def setup(self) -> None:
        """Declares the parts."""
        self.attn_norm = self.param("attn_norm", GIVEN, (self.config.width,))
        self.attention = Attention(self.config, self.tp, self.products)
        nn.share_scope(self, self.attention)
        self.mlp_norm = self.param("mlp_norm", GIVEN, (self.config.width,))
        self.mlp = MLP(self.config, self.tp, self.products)
        nn.share_scope(self, self.mlp)

    def __call__(
        self,
        x_TxM: Float[Array, "T M"],
        rotation: Rotation,
        attend: Attend,
        state: Any,
        *,
        layer: int | Int[Array, ""],
        window: int | Int[Array, ""] | None,
    ) -> tuple[Float[Array, "T M"], Any]:
        """Advances the residual stream by one layer; returns (x_TxM, state)."""
        eps = self.config.norm_eps
        normed_TxM = rms_norm(x_TxM, self.attn_norm, eps)
        y_TxM, state = self.attention(
            normed_TxM, rotation, attend, state, layer=layer, window=window
        )
        x_TxM += y_TxM
        return x_TxM + self.mlp(rms_norm(x_TxM, self.mlp_norm, eps)), state


class Decoder(nn.Module):
    """A whole model.

    Raises, when traced:
      ConfigError: `tp` does not divide the heads, the KV heads or the ffn.
      ModelError: the number of layers given is not the config's.
    """

    config: ModelConfig
    tp: int = 1
    products: Products = Products.NATIVE

    def setup(self) -> None:
        """Declares the weights outside the layers; these are declared by `DecoderLayer`."""
        c = self.config
        rows = weight_specs(c, self.tp)["embed"].shape[0] // self.tp
        self.embedding = self.param("embed", GIVEN, (rows, c.width))
        self.final_norm = self.param("final_norm", GIVEN, (c.width,))
        if c.tied_embeddings:
            self.unembedding = self.embedding
        else:
            self.unembedding = self.param("lm_head", GIVEN, (rows, c.width))

    def __call__(
        self,
        tokens_T: Int[Array, " T"],
        positions_T: Int[Array, " T"],
        attend: Attend,
        state: Any,
    ) -> tuple[Float[Array, "T M"], Any]:
        """Runs tokens through all layers; returns (x_TxM after the final norm, state)."""
        x_TxM = embed(self.embedding, tokens_T, self.tp)
        rotation = rotation_at(self.config.rope, self.config.head_dim, positions_T)
        layers: Any = self.get_variable("params", "layers")
        run = self._scan if isinstance(layers, Mapping) else self._loop
        x_TxM, state = run(layers, x_TxM, rotation, attend, state)
        return rms_norm(x_TxM, self.final_norm, self.config.norm_eps), state

    def logits(self, x_RxM: Float[Array, "R M"]) -> Float[Array, "R V"]:
        """float32 logits on every `tp` rank, V rounded up to a multiple of `tp` with -inf."""
        vocab_size = self.config.vocab_size
        return unembed(x_RxM, self.unembedding, vocab_size, self.tp, self.products)

    def _loop(
        self, layers: Any, x_TxM: jax.Array, rotation: Rotation, attend: Attend, state: Any
    ) -> tuple[jax.Array, Any]:
        self._check_layers(len(layers))
        # Each call brings its weights.
        module = DecoderLayer(self.config, self.tp, self.products, parent=None)

        # Traced once for all layers of a window; the compiler sees it inlined in each.
        @partial(jax.jit, static_argnames="window")
        def step(
            weights: Any, x_TxM: jax.Array, state: Any, layer: jax.Array, window: int | None
        ) -> tuple[jax.Array, Any]:
            return module.apply(
                {"params": weights}, x_TxM, rotation, attend, state, layer=layer, window=window
            )

        for i, (weights, window) in enumerate(zip(layers, self.config.windows, strict=True)):
            x_TxM, state = step(weights, x_TxM, state, jnp.int32(i), window)
        return x_TxM, state

    def _scan(
        self, layers: Any, x_TxM: jax.Array, rotation: Rotation, attend: Attend, state: Any
    ) -> tuple[jax.Array, Any]:
        windows = self.config.windows
        self._check_layers(len(layers["attn_norm"]))
        module = DecoderLayer(self.config, self.tp, self.products, parent=None)
        same = len(set(windows)) == 1  # then it stays a Python value, which kernels can use
        windows_L = None if same else jnp.array([w or NO_WINDOW for w in windows], jnp.int32)

        def step(carry: tuple[jax.Array, Any], at: tuple[Any, jax.Array, Any]) -> Any:
            (x_TxM, state), (weights, layer, window) = carry, at
            window = windows[0] if same else window
            carry = module.apply(
                {"params": weights}, x_TxM, rotation, attend, state, layer=layer, window=window
            )
            return carry, None

        layers_L = jnp.arange(self.config.layers, dtype=jnp.int32)
        carry, _ = lax.scan(step, (x_TxM, state), (layers, layers_L, windows_L))
        return carry

    def _check_layers(self, given: int) -> None:
        if given != self.config.layers:
            raise ModelError(f"weights have {given} layers, the config {self.config.layers}")
