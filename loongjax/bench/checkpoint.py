"""A random model as a checkpoint in the Hugging Face layout, so that peers run the same weights.

Owns the folder it writes. Values are float32; whoever serves bfloat16 rounds them itself, as
loongjax does. Imports no jax.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.models.weights import iter_specs, read_into, shard_index, weight_specs


def export_random(name: str, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` of `random:NAME`, unless they are there.

    `config.json` is written last, so that a folder which has it is whole. Raises ModelError
    for a shape that is not known, or is no plain Llama.
    """
    config = random_config(name)
    described = _hf_config(config)
    written = folder / "config.json"
    if written.exists() and json.loads(written.read_text()) == described:
        return
    written.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    source = RandomSource(config=config)
    tensors = {}
    for spec in iter_specs(weight_specs(config)):
        values = np.empty(spec.shape, np.float32)
        read_into(values, source, spec, shard_index(spec, 0, 1))
        tensors[spec.hf_name] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written.write_text(json.dumps(described, indent=2) + "\n")


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` says of a Llama."""
    if config.family != "llama" or config.rope.type != "default":
        raise ModelError(
            f"only plain Llama shapes are exported, not {config.family} with {config.rope.type} "
            "RoPE; use bench58m"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.base},
        "rope_theta": config.rope.base,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
