"""Tiny random transformers models, their weights as our tree, and plain attention.

The oracle of the model tests. Weights are drawn wide enough that attention is peaked and
norms and biases matter: with transformers' own initialization a wrong rotation or window
would hardly move the logits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from loongjax.models.config import ModelConfig
from loongjax.models.families import config_from_hf
from loongjax.models.weights import WeightSpec, weight_specs

TOKENS = 50
_SIZES = {
    "vocab_size": 163,  # odd, so that tp pads it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What each case is for, by what it sets; the rest is transformers' default.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha-untied": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa-tied-llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "lwm-mqa": (
        "Llama",
        {
            "num_key_value_heads": 1,
            "max_position_embeddings": 1_048_576,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e7},
        },
    ),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 24}),
    "qwen2-mixed-windows": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-yarn-upper-windows": (
        "Qwen3",
        {
            "head_dim": 32,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A transformers model and the same model as ours, all float32."""

    model: torch.nn.Module
    config: ModelConfig
    weights: dict[str, Any]

    def logits(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """What transformers computes, [T, V]."""
        with torch.no_grad():
            out = self.model(torch.tensor(tokens)[None], position_ids=torch.tensor(positions)[None])
        return out.logits[0].numpy()


def hf_config(name: str) -> transformers.PreTrainedConfig:
    """The transformers config of a case."""
    family, settings = CASES[name]
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **settings})
    config.architectures = [f"{family}ForCausalLM"]
    return config


@functools.cache
def reference(name: str) -> Reference:
    """The model of a case; the same weights every time."""
    hf = hf_config(name)
    config = config_from_hf(hf.to_dict())
    model = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data = torch.tensor(_draw(rng, tuple(parameter.shape)))
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    return Reference(model=model, config=config, weights=tree(config, state))


def prompt(config: ModelConfig, seed: int = 0) -> np.ndarray:
    """Random tokens, int32 [TOKENS]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, config.vocab_size, TOKENS, dtype=np.int32)


def tree(config: ModelConfig, state: dict[str, np.ndarray], tp: int = 1) -> dict[str, Any]:
    """A state dict as our tree, unrolled; rows are padded for `tp` with zeros."""

    def leaf(spec: WeightSpec) -> np.ndarray:
        array = state[spec.hf_name]
        return np.pad(array, [(0, s - a) for s, a in zip(spec.shape, array.shape, strict=True)])

    specs = weight_specs(config, tp)
    layers = tuple({k: leaf(s) for k, s in layer.items()} for layer in specs.pop("layers"))
    return {**{key: leaf(spec) for key, spec in specs.items()}, "layers": layers}


def stacked(weights: dict[str, Any]) -> dict[str, Any]:
    """The same tree with one [L, ...] leaf for each weight of a layer."""
    layers = weights["layers"]
    return {**weights, "layers": {k: np.stack([w[k] for w in layers]) for k in layers[0]}}


def causal_attend(state, *, layer, window, q_TxHxD, k_TxGxD, v_TxGxD):
    """Attention among the tokens themselves; `state` [L] counts the calls of each layer."""
    tokens, heads, head_dim = q_TxHxD.shape
    q_TxGxNxD = q_TxHxD.reshape(tokens, k_TxGxD.shape[1], -1, head_dim).astype(jnp.float32)
    scores = jnp.einsum("tgnd,sgd->gnts", q_TxGxNxD, k_TxGxD.astype(jnp.float32))
    age = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    visible = age >= 0 if window is None else (age >= 0) & (age < window)
    scores = jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    o_TxGxNxD = jnp.einsum("gnts,sgd->tgnd", weights, v_TxGxD.astype(jnp.float32))
    return o_TxGxNxD.reshape(tokens, heads, head_dim), state.at[layer].add(1)


def relative_error(got: Any, want: Any) -> float:
    """max |got - want| / max |want|."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:  # norms and biases alike
        return 1 + 0.5 * noise
    return noise * np.float32(1.5 / np.sqrt(shape[1]))
