"""The weight tree against transformers, the cuts of tensor parallelism, random weights."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.errors import ConfigError, ModelError
from loongjax.models.families import config_from_hf
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.models.weights import (
    iter_specs,
    read_into,
    shard_index,
    weight_leaves,
    weight_specs,
)

TINY = random_config("tiny")
ODD = dataclasses.replace(TINY, vocab_size=509)  # a prime: every tp pads it
BIASED = dataclasses.replace(TINY, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)

FAMILIES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": None},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = getattr(transformers, f"{family}Config")(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, **FAMILIES[family],
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(hf_config)
    config = config_from_hf(hf_config.to_dict() | {"architectures": [f"{family}ForCausalLM"]})
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tied_embeddings:
        del expected["lm_head.weight"]
    specs = list(iter_specs(weight_specs(config)))
    assert {spec.hf_name: spec.stored_shape for spec in specs} == expected


def read(spec, index, config=ODD):
    parts = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
    out = np.full([len(part) for part in parts], np.nan, np.float32)
    read_into(out, RandomSource(config=config), spec, index)
    return out


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("config", [ODD, BIASED])
def test_shards_together_are_the_whole(tp, config):
    cut = set()
    for spec in iter_specs(weight_specs(config, tp)):
        shards = [read(spec, shard_index(spec, rank, tp), config) for rank in range(tp)]
        whole = shards[0] if spec.tp_axis is None else np.concatenate(shards, axis=spec.tp_axis)
        assert whole.shape == spec.shape
        stored = tuple(slice(0, size) for size in spec.stored_shape)
        np.testing.assert_array_equal(
            whole[stored], RandomSource(config=config).read(spec, stored), err_msg=spec.path
        )
        assert not whole[spec.stored_shape[0] :].any()
        if spec.tp_axis is not None:
            cut.add((spec.key, spec.tp_axis))
    always = {(key, 0) for key in ("embed", "lm_head", "q", "k", "v", "gate", "up")}
    biases = {(f"{key}_bias", 0) for key in ("q", "k", "v", "gate", "up")}
    assert cut == always | {("o", 1), ("down", 1)} | (biases if config is BIASED else set())


class NeverRead:
    def read(self, spec, index):
        raise AssertionError(f"{spec.path} was read")


def test_a_rank_with_only_padding_asks_nothing_of_the_source():
    config = dataclasses.replace(TINY, vocab_size=1)
    spec = weight_specs(config, tp=2)["embed"]
    assert spec.shape == (2, TINY.width)
    out = np.full((1, TINY.width), np.nan, np.float32)
    read_into(out, NeverRead(), spec, shard_index(spec, 1, 2))
    assert not out.any()


@pytest.mark.parametrize(
    ("tp", "change", "message"),
    [
        (3, {}, r"tp=3 does not divide the model's attention heads \(4\)"),
        (4, {}, r"tp=4 does not divide the model's KV heads \(2\)"),
        (2, {"ffn": 129}, r"tp=2 does not divide the model's MLP inner size \(129\)"),
        (0, {}, "tp must be at least 1, not 0"),
    ],
)
def test_a_tp_that_does_not_divide_is_refused(tp, change, message):
    with pytest.raises(ConfigError, match=message):
        weight_specs(dataclasses.replace(TINY, **change), tp)


def test_stacked_leaves_have_a_layer_axis_first():
    layers = weight_leaves(BIASED, 2, stacked=True)["layers"]
    assert layers["down"].shape == (2, 64, 128)
    assert layers["down"].tp_axis == 2
    assert layers["down"].shard_shape(2) == (2, 64, 64)
    assert layers["attn_norm"].tp_axis is None
    assert [spec.layer for spec in layers["q"].tensors] == [0, 1]
    separate = weight_leaves(BIASED, 2, stacked=False)["layers"]
    assert [set(layer) for layer in separate] == [set(layers)] * 2
    assert separate[1]["down"].shape == (64, 128)
    assert separate[1]["down"].tp_axis == 1


@functools.cache
def three_blocks():
    """A tensor of three blocks of rows, the last one short, and all its values."""
    spec = weight_specs(TINY)["embed"]
    spec = dataclasses.replace(spec, stored_shape=(700, 8), shape=(700, 8))
    return spec, RandomSource(config=TINY).read(spec, (slice(0, 700), slice(0, 8)))


@given(
    st.lists(st.integers(0, 700), min_size=2, max_size=2, unique=True),
    st.lists(st.integers(0, 8), min_size=2, max_size=2, unique=True),
)
def test_random_values_do_not_depend_on_what_is_read_with_them(rows, columns):
    spec, whole = three_blocks()
    index = (slice(*sorted(rows)), slice(*sorted(columns)))
    part = RandomSource(config=TINY).read(spec, index)
    np.testing.assert_array_equal(part, whole[index])


def test_random_tensors_differ_and_have_the_scale_of_their_fan_in():
    source = RandomSource(config=TINY)
    values = {
        spec.path: source.read(spec, tuple(slice(0, size) for size in spec.stored_shape))
        for spec in iter_specs(weight_specs(TINY))
    }
    matrices = {path: value for path, value in values.items() if value.ndim == 2}
    firsts = [round(float(value[0, 0]), 7) for value in matrices.values()]
    assert len(set(firsts)) == len(matrices)
    assert values["layers.0.k"].std() == pytest.approx(1 / 8, rel=0.1)
    assert values["layers.1.down"].std() == pytest.approx(128**-0.5, rel=0.1)
    assert values["final_norm"].mean() == pytest.approx(1, abs=0.1)


def test_an_unknown_random_shape_lists_the_known_ones():
    with pytest.raises(ModelError, match=r"'nano'; known are bench58m, .*, tiny"):
        random_config("nano")


def test_reading_weights_imports_no_jax():
    modules = ("weights", "safetensors", "gguf", "random_weights", "resolve", "demo")
    code = "; ".join(f"import loongjax.models.{name}" for name in modules)
    code += "; import sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
