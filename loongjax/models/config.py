"""The description of a model: everything that its programs depend on, and no weights.

Families differ only in these fields; `loongjax.models.families` fills them from the
config files of checkpoints. Imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      type: How frequencies are stretched beyond the original context.
      base: The base of the geometric series of frequencies (`rope_theta`).
      factor: Stretch of `linear`, `llama3` and `yarn`; 1 for `default`.
      original_max_position: Context before stretching (`llama3`, `yarn`).
      low_freq_factor, high_freq_factor: Band edges of `llama3`.
      beta_fast, beta_slow: Band edges of `yarn`, in rotations.
      attention_factor: Scale of cos and sin in `yarn`; None: 0.1 ln(factor) + 1, or from
        `mscale` and `mscale_all_dim` where a checkpoint gives them.
      mscale, mscale_all_dim: `yarn` attention scaling of some checkpoints.
      truncate: Whether `yarn` rounds its band edges to whole dimensions.
    """

    type: RopeType = "default"
    base: float = 10_000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with rotary positions, RMS norms and a gated MLP.

    A change of any field but the token ids recompiles every program.

    Attributes:
      family: The architecture's short name: llama, mistral, qwen2, qwen3.
      vocab_size: V, rows of the embedding.
      width: M, size of the residual stream.
      layers: L.
      heads: H, query heads.
      kv_heads: G, key and value heads; divides H.
      head_dim: D.
      ffn: F, inner size of the MLP.
      norm_eps: Epsilon of every RMS norm.
      rope: Rotary positions.
      max_positions: Tokens of context that the model was made for.
      tied_embeddings: The output projection is the embedding itself.
      qkv_bias: Q, K and V projections have a bias (Qwen2).
      o_bias: The output projection of attention has a bias.
      mlp_bias: The MLP's projections have biases.
      qk_norm: Q and K are RMS-normed per head before RoPE (Qwen3).
      windows: Sliding window of each layer [tokens, the query's own included], None: full.
      bos_id: Token put before a raw prompt, or None.
      eos_ids: Tokens that end an answer.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize
