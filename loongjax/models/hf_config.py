"""From a `ModelConfig` to the `config.json` that says the same: the way back of `families`.

Promises: `config_from_hf(config_to_hf(config))` is `config`; what that file cannot say is refused.
Imports no jax.
"""

from __future__ import annotations

from typing import Any

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig, RopeConfig
from loongjax.models.families import FAMILIES, config_from_hf

_MODEL_TYPES = {family.name: name for name, family in FAMILIES.items()}


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`, as transformers reads it; without a dtype.

    Raises:
      ModelError: No such file describes this model.
    """
    rope = _rope(config.rope)
    windows = sorted({window for window in config.windows if window is not None})
    described = {
        "architectures": [_MODEL_TYPES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_parameters": rope,
        # The older spelling, for readers that know no other.
        "rope_theta": config.rope.base,
        "rope_scaling": None if config.rope.type == "default" else rope,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "sliding_window": windows[0] if windows else None,
        **_windows(config),
    }
    if config_from_hf(described) != config:
        raise ModelError(
            f"no config.json describes this {config.family} model as it is: one with windows "
            f"{windows} and biases of its own cannot be written in the Hugging Face layout"
        )
    return described


def _windows(config: ModelConfig) -> dict[str, Any]:
    """Of each layer, for the families that have them so."""
    if config.family not in ("qwen2", "qwen3"):
        return {}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return {"use_sliding_window": "sliding_attention" in kinds, "layer_types": kinds}


def _rope(rope: RopeConfig) -> dict[str, Any]:
    said: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.base}
    if rope.type != "default":
        said["factor"] = rope.factor
    if rope.type in ("llama3", "yarn"):
        said["original_max_position_embeddings"] = rope.original_max_position
    if rope.type == "llama3":
        said |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.type == "yarn":
        more = {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
            "truncate": rope.truncate,
        }
        said |= {key: value for key, value in more.items() if value is not None}
    return said
