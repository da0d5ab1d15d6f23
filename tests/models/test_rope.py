"""Rotary positions against transformers' own functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from loongjax.errors import ModelError
from loongjax.models.config import RopeConfig
from loongjax.models.families import config_from_hf
from loongjax.models.rope import frequencies, rotate, rotation_at

ORIGINAL = {"original_max_position_embeddings": 8192}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "lwm": {"rope_type": "default", "rope_theta": 5e7},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
    "llama3.1": {**LLAMA3, "rope_theta": 500_000.0, "factor": 8.0},
    "llama3.2": {**LLAMA3, "rope_theta": 500_000.0, "factor": 32.0},
    "yarn": {**YARN, "rope_theta": 1_000_000.0},
    "yarn-whole": {**YARN, "rope_theta": 10_000.0, "truncate": False},
    "yarn-betas": {**YARN, "rope_theta": 10_000.0, "beta_fast": 24.0, "beta_slow": 2.0},
    "yarn-step": {**YARN, "rope_theta": 10_000.0, "beta_fast": 1.0, "beta_slow": 1.0},
    "yarn-below-0": {**YARN, "rope_theta": 10_000.0, "beta_fast": 1e5, "beta_slow": 1e4},
    "yarn-attention": {**YARN, "rope_theta": 10_000.0, "attention_factor": 1.25},
    "yarn-mscale": {**YARN, "rope_theta": 10_000.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn-mscale-0": {**YARN, "rope_theta": 10_000.0, "mscale": 0.7, "mscale_all_dim": 0.0},
}


def both(name: str, head_dim: int):
    """(transformers' config, ours) of one kind of RoPE."""
    hf = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=32_768,
        rope_parameters=dict(ROPES[name]),
    )
    hf.architectures = ["LlamaForCausalLM"]
    return hf, config_from_hf(hf.to_dict()).rope


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Distance of positive float32 numbers in units in the last place."""
    return np.abs(got.view(np.int32) - want.view(np.int32))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name, head_dim):
    hf, rope = both(name, head_dim)
    if rope.type == "default":
        want, attention_factor = LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
    else:
        want, attention_factor = ROPE_INIT_FUNCTIONS[rope.type](hf)
    got = frequencies(rope, head_dim)
    assert got.inverse.dtype == np.float32
    assert got.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    distance = ulps(got.inverse, want.numpy())
    # torch's float32 power is itself good to 1 unit; interpolation enlarges the difference.
    assert distance.max() <= 4
    assert np.mean(distance == 0) >= 0.85


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_a_stretch_without_its_original_context_is_refused(kind):
    with pytest.raises(ModelError, match=f"'{kind}' needs original_max_position"):
        frequencies(RopeConfig(type=kind, factor=8.0), 64)


@pytest.mark.parametrize("name", ["default", "lwm", "yarn"])
def test_angles_stay_float32_exact_far_into_the_context(name):
    _, rope = both(name, 128)
    positions = np.array([0, 1, 4095, 100_003, 131_071, 524_287, 1_048_575, 4_000_037])
    got = jax.jit(lambda p: rotation_at(rope, 128, p))(jnp.asarray(positions, jnp.int32))
    freq = frequencies(rope, 128)
    # float32 product, as transformers takes it; then cosines beyond doubt
    angles = positions[:, None].astype(np.float32) * freq.inverse
    want = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    assert got.cos_TxE.dtype == got.sin_TxE.dtype == jnp.float32
    for mine, exact in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, exact * freq.attention_factor, rtol=0, atol=2e-7)


@pytest.mark.parametrize("first", [0, 1_000_000])
def test_rotation_is_that_of_transformers(first):
    hf, rope = both("lwm", 16)
    positions = first + np.arange(12)
    x = np.random.default_rng(0).standard_normal((12, 3, 16), dtype=np.float32)
    cos, sin = LlamaRotaryEmbedding(hf)(torch.tensor(x), torch.tensor(positions)[None])
    heads_first = torch.tensor(x).transpose(0, 1)[None]
    want, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    got = rotate(jnp.asarray(x), *rotation_at(rope, 16, jnp.asarray(positions)))
    np.testing.assert_allclose(got, want[0].transpose(0, 1).numpy(), rtol=0, atol=1e-5)


def test_low_precision_is_rounded_once():
    _, rope = both("default", 16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 2, 16)), jnp.bfloat16)
    rotation = rotation_at(rope, 16, 100_000 + jnp.arange(9))
    exact = rotate(x.astype(jnp.float32), *rotation)
    np.testing.assert_array_equal(rotate(x, *rotation), exact.astype(jnp.bfloat16))


@settings(max_examples=25)
@given(first=st.integers(0, 2000), gap=st.integers(0, 500), shift=st.integers(0, 2000))
def test_scores_depend_on_distance_alone(first, gap, shift):
    _, rope = both("llama3.1", 16)
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 16), dtype=np.float32)

    def score(query_position, key_position):
        at = jnp.array([query_position]), jnp.array([key_position])
        q_1x1xD, k_1x1xD = (
            rotate(jnp.asarray(x), *rotation_at(rope, 16, p))
            for x, p in zip((q, k), at, strict=True)
        )
        return float(jnp.vdot(q_1x1xD, k_1x1xD))

    here, there = score(first + gap, first), score(first + gap + shift, first + shift)
    # angles up to 4500 rad have a float32 unit of 5e-4; a vector of 16 normals, length 4
    assert here == pytest.approx(there, abs=0.02)
