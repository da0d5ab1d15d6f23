"""A random model as a checkpoint in the Hugging Face layout, so that peers run the same weights.

Owns the folder it writes. Values are float32; whoever serves bfloat16 rounds them itself, as
loongjax does. Imports no jax.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from loongjax.models.hf_config import config_to_hf
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.models.weights import iter_specs, read_into, shard_index, weight_specs


def export_random(name: str, folder: Path) -> None:
    """Writes `config.json` and `model.safetensors` of `random:NAME`, unless they are there.

    `config.json` is written last, so that a folder which has it is whole. Raises ModelError
    for a shape that is not known.
    """
    config = random_config(name)
    described = config_to_hf(config) | {"dtype": "float32", "torch_dtype": "float32"}
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
