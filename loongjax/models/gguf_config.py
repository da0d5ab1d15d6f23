"""What a GGUF file's metadata says of its model, as a `ModelConfig`.

Owns the keys of architectures llama (Llama, Mistral and kin), qwen2 and qwen3, and the
recovery of Llama 3's stretched rotary frequencies from the factors that a file lists.
Refuses, by key, whatever would change the computation and is not known here, such as
experts, soft caps, or partial rotation. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig, RopeConfig
from loongjax.models.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by whose values [D/2] the rotary frequencies are divided."""

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REFUSED = (
    "expert_count",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "nextn_predict_layers",
    "rope.scaling.alpha",
    "rope.scaling.yarn_log_multiplier",
)
"""Keys that change the computation unless they are 0 or absent."""
_REFUSED_UNLESS_ONE = (
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "attention.causal",
)


def config_from_gguf(file: GgufFile, rope_factors: np.ndarray | None) -> ModelConfig:
    """The model that a file describes.

    `rope_factors` are the values of the tensor `ROPE_FACTORS`, None without it. Raises
    ModelError, naming the key, for what is absent, malformed or not supported.
    """
    from loongjax.models.families import config_from_hf

    keys = _Keys(file)
    config = config_from_hf(_hf_config(file, keys), None)
    if rope_factors is not None:
        rope = _fit_llama3(config, rope_factors)
        if rope is None:
            raise ModelError(
                f"{file.path}: the rotary factors of tensor {ROPE_FACTORS!r} are not those of "
                "Llama 3 (1 for short wavelengths, a constant for long ones, a ramp between)"
            )
        config = dataclasses.replace(config, rope=rope)
    return dataclasses.replace(  # biases are what the file holds, whatever the family's habit
        config,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
    )


class _Keys:
    """The metadata of one architecture, by keys without its prefix."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        architecture = file.metadata.get("general.architecture")
        self.architecture = str(architecture)
        if architecture not in _ARCHITECTURES:
            raise ModelError(
                f"{file.path}: architecture {architecture!r} is not supported; "
                f"supported are {', '.join(_ARCHITECTURES)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self._file.metadata.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: int | float | None = None) -> Any:
        """A number above 0; where there is one for each layer, all alike, that one."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ModelError(
                f"{self._file.path}: {self.architecture}.{key} must be one number above 0, "
                f"not {value!r}"
            )
        return value

    def refuse(self, key: str) -> ModelError:
        return ModelError(
            f"{self._file.path}: {self.architecture}.{key} = {self.get(key)!r} is not supported"
        )


def _hf_config(file: GgufFile, keys: _Keys) -> dict[str, Any]:
    """The metadata in the words of a Hugging Face config.json."""
    if file.metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{file.path}: part of a split GGUF file of {file.metadata['split.count']} parts; "
            "merge them into one file first"
        )
    for key in _REFUSED:
        if keys.get(key):
            raise keys.refuse(key)
    for key in _REFUSED_UNLESS_ONE:
        if keys.get(key, 1.0) != 1.0:
            raise keys.refuse(key)
    heads, width = keys.number("attention.head_count"), keys.number("embedding_length")
    head_dim = keys.number("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.number(key, head_dim) != head_dim:
            raise keys.refuse(key)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path}: tensor 'token_embd.weight' is missing")
    config = {
        "architectures": [_ARCHITECTURES[keys.architecture]],
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": keys.number("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(keys.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(keys.number("rope.freq_base", 10_000.0)),
        "rope_scaling": _rope_scaling(keys),
        "max_position_embeddings": keys.number("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": _bos(file),
        "eos_token_id": _eos(file),
    }
    if keys.get("attention.sliding_window"):
        if keys.architecture != "llama":  # which layers have it is not in the metadata
            raise keys.refuse("attention.sliding_window")
        config |= {
            "architectures": ["MistralForCausalLM"],
            "sliding_window": keys.number("attention.sliding_window"),
        }
    return config


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "linear" if keys.get("rope.scale_linear") else "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise keys.refuse("rope.scaling.type")
    factor = _shortest(keys.number("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.number("rope.scaling.original_context_length"),
        "beta_fast": _shortest(keys.number("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": _shortest(keys.number("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _bos(file: GgufFile) -> int | None:
    """The token put before a raw prompt. A file that does not say follows its vocabulary:
    SentencePiece ones and Llama 3's begin with it, other BPE ones do not.
    """
    model = file.metadata.get("tokenizer.ggml.model")
    habit = model == "llama" or file.metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    adds = file.metadata.get("tokenizer.ggml.add_bos_token", habit)
    return file.metadata.get("tokenizer.ggml.bos_token_id") if adds else None


def _eos(file: GgufFile) -> list[int]:
    """Ends of text, of turn and of message, whichever the file has."""
    ends = (file.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom"))
    return list(dict.fromkeys(end for end in ends if end is not None))


def _shortest(value: int | float) -> float:
    """The decimal that a float32 was written as: 9.99999974e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _fit_llama3(config: ModelConfig, factors: np.ndarray) -> RopeConfig | None:
    """The `llama3` stretch whose frequencies are divided by `factors` [D/2], or None.

    With wavelength w, 1 / factor is 1 below `original / high`, 1 / F above `original / low`
    and in between linear in 1 / w:  1 / factor = 1/F + (1 - 1/F) (original/w - low) / (high - low).
    The ramp's two ends fix `original / low` and `original / high`; low is 1 by convention.
    """
    if len(factors) != config.head_dim // 2 or config.rope.type != "default":
        return None
    if np.all(factors == 1.0):
        return config.rope
    inverse_wave = config.rope.base ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    stretch = float(factors.max())
    if stretch <= 1.0:
        return None
    ramp = (1 / factors.astype(np.float64) - 1 / stretch) / (1 - 1 / stretch)
    inside = (ramp > 1e-4) & (ramp < 1 - 1e-4)
    if inside.sum() < 2:
        return None
    slope, offset = np.polyfit(inverse_wave[inside], ramp[inside], 1)
    if offset >= 0:
        return None
    original, high = round(-slope / offset), round(1 - 1 / offset, 3)
    fitted = np.clip((original * inverse_wave - 1) / (high - 1), 0, 1)
    if not np.allclose(factors, 1 / ((1 - fitted) / stretch + fitted), rtol=1e-3):
        return None
    return RopeConfig(
        type="llama3",
        base=config.rope.base,
        factor=_shortest(stretch),
        original_max_position=original,
        low_freq_factor=1.0,
        high_freq_factor=high,
    )
