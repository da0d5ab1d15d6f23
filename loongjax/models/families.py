"""From the config files of a checkpoint to a `ModelConfig`.

Owns the table of model families: what each architecture adds to, or reads differently
from, the Llama that they all descend from. To add a family whose layers have the parts
that `ModelConfig` can name, add an entry to `FAMILIES`; a new part goes into
`loongjax.models.decoder` first.

Reads both spellings of rotary positions: `rope_parameters`, and the older `rope_theta` with
`rope_scaling`. Refuses by name what it cannot honour: a config that is accepted computes
what transformers computes. Reads no files and no weights; imports no jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig, RopeConfig

Windows: TypeAlias = tuple[int | None, ...]

_DEFAULT_ROPE_BASE = 10_000.0  # of configs that name none, such as Llama 2's first ones


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One architecture, as a departure from plain Llama.

    The three biases are a constant, or the key of the config that decides.

    Attributes:
      name: `ModelConfig.family`.
      windows: Reads the sliding window of each layer from (config, number of layers).
      qkv_bias, o_bias, mlp_bias: Which projections have a bias.
      qk_norm: Q and K are normed per head.
      prepends_bos: A raw prompt starts with `bos_token_id`. Qwen's configs name such a
        token, but its tokenizers do not put it there.
      required: Keys without a default here, because transformers has one of its own.
    """

    name: str
    windows: Callable[[Mapping[str, Any], int], Windows]
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    prepends_bos: bool = True
    required: tuple[str, ...] = ()


def config_from_hf(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Reads the contents of `config.json` and, where there is one, `generation_config.json`.

    End tokens come from `generation_config`, or from `config` where that names none.

    Raises:
      ModelError: the architecture is unknown, a key is missing or of the wrong kind, or
        the config asks for something that loongjax does not compute.
    """
    architecture, family = _family(config)
    _refuse_unsupported(config, architecture, family)
    for key in family.required:
        _integer(config, key)
    width = _integer(config, "hidden_size")
    layers = _integer(config, "num_hidden_layers")
    heads = _integer(config, "num_attention_heads")
    kv_heads = _integer(config, "num_key_value_heads", default=heads)
    max_positions = _integer(config, "max_position_embeddings")
    bos_id = config.get("bos_token_id") if family.prepends_bos else None
    return ModelConfig(
        family=family.name,
        vocab_size=_integer(config, "vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=_divisor_of_heads(kv_heads, heads),
        head_dim=_head_dim(config, width, heads),
        ffn=_integer(config, "intermediate_size"),
        norm_eps=_number(config, "rms_norm_eps"),
        rope=_rope(config, max_positions),
        max_positions=max_positions,
        tied_embeddings=_flag(config, "tie_word_embeddings"),
        windows=family.windows(config, layers),
        qkv_bias=_flag(config, family.qkv_bias),
        o_bias=_flag(config, family.o_bias),
        mlp_bias=_flag(config, family.mlp_bias),
        qk_norm=family.qk_norm,
        bos_id=None if bos_id is None else _integer(config, "bos_token_id", least=0),
        eos_ids=_end_tokens(generation_config or {}) or _end_tokens(config),
    )


# --- sliding windows ------------------------------------------------------------------


def _no_windows(config: Mapping[str, Any], layers: int) -> Windows:
    """Llama: full attention, whatever the config says."""
    return (None,) * layers


def _one_window(config: Mapping[str, Any], layers: int) -> Windows:
    """Mistral: `sliding_window`, if set, holds in all layers."""
    if config.get("layer_types") is not None:
        raise ModelError(
            "config key 'layer_types' is not part of MistralForCausalLM, which has one window "
            "for all layers; remove the key if 'sliding_window' says all"
        )
    if config.get("sliding_window") is None:
        return (None,) * layers
    return (_integer(config, "sliding_window"),) * layers


def _window_by_layer(config: Mapping[str, Any], layers: int) -> Windows:
    """Qwen: `layer_types` names each layer; older configs window from one layer upwards."""
    enabled = _flag(config, "use_sliding_window")
    types = config.get("layer_types")
    if types is None:
        if not enabled or config.get("sliding_window") is None:
            return (None,) * layers
        first = _integer(config, "max_window_layers", least=0)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if not isinstance(types, Sequence) or len(types) != layers:
        raise ModelError(
            f"config key 'layer_types' must name each of the {layers} layers of "
            f"'num_hidden_layers', not {types!r}"
        )
    unknown = sorted({str(t) for t in types} - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelError(
            f"config key 'layer_types' has {unknown}; loongjax computes 'full_attention' and "
            "'sliding_attention'"
        )
    if "sliding_attention" not in types:
        return (None,) * layers
    if not enabled:
        raise ModelError(
            "config key 'layer_types' has 'sliding_attention', but 'use_sliding_window' is "
            "false; make them agree"
        )
    window = _integer(config, "sliding_window")
    return tuple(window if t == "sliding_attention" else None for t in types)


# --- the table ------------------------------------------------------------------------

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        name="llama",
        windows=_no_windows,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "MistralForCausalLM": Family(
        name="mistral",
        windows=_one_window,
        required=("num_key_value_heads",),
    ),
    "Qwen2ForCausalLM": Family(
        name="qwen2",
        windows=_window_by_layer,
        qkv_bias=True,
        prepends_bos=False,
        required=("num_key_value_heads",),
    ),
    "Qwen3ForCausalLM": Family(
        name="qwen3",
        windows=_window_by_layer,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        prepends_bos=False,
        required=("num_key_value_heads", "head_dim"),
    ),
}


# --- rotary positions -----------------------------------------------------------------


def _rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # Where a config has both spellings, transformers follows the older one.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"config key 'rope_parameters' must be an object, not {rope!r}")
    nested = sorted(key for key, value in rope.items() if isinstance(value, Mapping))
    if nested:
        raise ModelError(
            f"config key 'rope_parameters' differs by layer type ({nested}); loongjax rotates "
            "all layers alike"
        )
    # The inner values win over those beside the dictionary, but for the original context.
    rope = {
        "rope_theta": config.get("rope_theta", _DEFAULT_ROPE_BASE),
        "partial_rotary_factor": config.get("partial_rotary_factor"),
        "original_max_position_embeddings": max_positions,
        **rope,
    }
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if rope["partial_rotary_factor"] not in (None, 1, 1.0):
        raise ModelError(
            f"config key 'partial_rotary_factor' is {rope['partial_rotary_factor']}; loongjax "
            "rotates whole heads only (1.0)"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_READERS:
        raise ModelError(
            f"RoPE type {kind!r} is not supported; loongjax knows {sorted(_ROPE_READERS)}"
        )
    return _ROPE_READERS[kind](rope, max_positions)


def _rope_default(rope: Mapping[str, Any], max_positions: int) -> RopeConfig:
    return RopeConfig(type="default", base=_number(rope, "rope_theta"))


def _rope_linear(rope: Mapping[str, Any], max_positions: int) -> RopeConfig:
    return RopeConfig(
        type="linear", base=_number(rope, "rope_theta"), factor=_number(rope, "factor")
    )


def _rope_llama3(rope: Mapping[str, Any], max_positions: int) -> RopeConfig:
    return RopeConfig(
        type="llama3",
        base=_number(rope, "rope_theta"),
        factor=_number(rope, "factor"),
        original_max_position=_integer(rope, "original_max_position_embeddings"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
    )


def _rope_yarn(rope: Mapping[str, Any], max_positions: int) -> RopeConfig:
    original = _integer(rope, "original_max_position_embeddings")
    # An explicit null means the ratio of the contexts; no key at all is a mistake.
    stretch = max_positions / original if "factor" in rope else None
    return RopeConfig(
        type="yarn",
        base=_number(rope, "rope_theta"),
        factor=_number(rope, "factor", default=stretch),
        original_max_position=original,
        beta_fast=_optional(rope, "beta_fast") or 32.0,
        beta_slow=_optional(rope, "beta_slow") or 1.0,
        mscale=_optional(rope, "mscale"),
        mscale_all_dim=_optional(rope, "mscale_all_dim"),
        attention_factor=_optional(rope, "attention_factor"),
        truncate=_flag(rope, "truncate", default=True),
    )


_ROPE_READERS: Mapping[str, Callable[[Mapping[str, Any], int], RopeConfig]] = {
    "default": _rope_default,
    "linear": _rope_linear,
    "llama3": _rope_llama3,
    "yarn": _rope_yarn,
}


# --- what is refused, and how a key is read -------------------------------------------


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    known = f"loongjax knows {sorted(FAMILIES)}"
    architectures = config.get("architectures")
    if not architectures:
        raise ModelError(f"config key 'architectures' is missing or empty; {known}")
    for architecture in architectures:
        if architecture in FAMILIES:
            return architecture, FAMILIES[architecture]
    raise ModelError(f"architecture {', '.join(map(str, architectures))} is not supported; {known}")


def _refuse_unsupported(config: Mapping[str, Any], architecture: str, family: Family) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed")
        raise ModelError(
            f"the checkpoint is quantized with {method!r} ('quantization_config'); loongjax "
            "reads float32, float16 and bfloat16 safetensors, and GGUF files"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"config key 'hidden_act' is {activation!r}; loongjax computes 'silu'")
    for key, bias in (("attention_bias", family.qkv_bias), ("mlp_bias", family.mlp_bias)):
        if bias is False and _flag(config, key):
            raise ModelError(f"config key {key!r} is true, but {architecture} has no such bias")


def _head_dim(config: Mapping[str, Any], width: int, heads: int) -> int:
    if config.get("head_dim") is None and width % heads:
        raise ModelError(
            f"config key 'hidden_size' ({width}) must be a multiple of 'num_attention_heads' "
            f"({heads}) where 'head_dim' is not given"
        )
    head_dim = _integer(config, "head_dim", default=width // heads)
    if head_dim % 2:
        raise ModelError(f"'head_dim' must be even for RoPE, not {head_dim}")
    return head_dim


def _divisor_of_heads(kv_heads: int, heads: int) -> int:
    if heads % kv_heads:
        raise ModelError(
            f"config key 'num_attention_heads' ({heads}) must be a multiple of "
            f"'num_key_value_heads' ({kv_heads})"
        )
    return kv_heads


def _end_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    tokens = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in tokens):
        raise ModelError(f"config key 'eos_token_id' must be token ids, not {value!r}")
    return tuple(dict.fromkeys(tokens))


def _value(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config key {key!r} is missing")
    return value


def _integer(
    config: Mapping[str, Any], key: str, default: int | None = None, least: int = 1
) -> int:
    value = _value(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelError(f"config key {key!r} must be a whole number >= {least}, not {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _value(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"config key {key!r} must be a number > 0, not {value!r}")
    return float(value)


def _optional(config: Mapping[str, Any], key: str) -> float | None:
    """A number where missing, null and 0 all mean unset, as in transformers."""
    return _number(config, key) if config.get(key) else None


def _flag(config: Mapping[str, Any], key: bool | str, default: bool = False) -> bool:
    """The value of a key, or the constant given in its place."""
    value = key if isinstance(key, bool) else config.get(key)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise ModelError(f"config key {key!r} must be true or false, not {value!r}")
    return value
