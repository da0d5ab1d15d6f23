"""The exported checkpoint is the same model for us and for transformers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from loongjax.bench.checkpoint import export_random
from loongjax.models.random_weights import RandomSource
from loongjax.models.resolve import resolve
from loongjax.models.weights import iter_specs, read_into, shard_index, weight_specs
from tests.models.hf_reference import relative_error, tree
from tests.models.test_decoder import jit_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    export_random("tiny", path)
    return path


def test_it_is_the_random_model(folder):
    exported, original = resolve(str(folder)), resolve("random:tiny")
    assert exported.config == original.config
    for spec in iter_specs(weight_specs(original.config)):
        index = shard_index(spec, 0, 1)
        np.testing.assert_array_equal(
            exported.source.read(spec, index), original.source.read(spec, index)
        )


def test_transformers_computes_the_same_logits(folder):
    config = resolve("random:tiny").config
    source, state = RandomSource(config=config), {}
    for spec in iter_specs(weight_specs(config)):
        state[spec.hf_name] = np.empty(spec.shape, np.float32)
        read_into(state[spec.hf_name], source, spec, shard_index(spec, 0, 1))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 40, dtype=np.int32)
    ours, _ = jit_run(config, tree(config, state), jnp.asarray(ids))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    assert relative_error(np.asarray(ours), theirs) < 1e-4


def test_a_second_export_writes_nothing(folder):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    export_random("tiny", folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
