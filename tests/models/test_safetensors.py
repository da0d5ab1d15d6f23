"""Safetensors folders: what transformers writes, and files damaged by hand."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from loongjax.errors import ModelError
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.models.safetensors import (
    open_safetensors,
    read_folder_config,
    read_safetensors,
)
from loongjax.models.weights import iter_specs, shard_index, weight_specs

TINY = random_config("tiny")
NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
NAMES |= {np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.int64): "I64"}


def whole(spec):
    return tuple(slice(0, size) for size in spec.stored_shape)


def write(file, tensors):
    header, data = {"__metadata__": {"format": "np"}}, b""
    for name, value in tensors.items():
        end = len(data) + value.nbytes
        header[name] = {
            "dtype": NAMES[value.dtype],
            "shape": value.shape,
            "data_offsets": [len(data), end],
        }
        data += value.tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tiny_tensors(dtype=np.float32):
    source = RandomSource(config=TINY)
    return {
        spec.hf_name: source.read(spec, whole(spec)).astype(dtype)
        for spec in iter_specs(weight_specs(TINY))
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sharded_checkpoint_of_transformers_is_read_exactly(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, eos_token_id=7,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(hf_config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    config = read_folder_config(tmp_path)
    assert config.eos_ids == (7,)
    source = open_safetensors(tmp_path, config)
    state = model.state_dict()
    for spec in iter_specs(weight_specs(config, tp=2)):
        expected = state.pop(spec.hf_name).float().numpy()
        read = source.read(spec, whole(spec))
        assert read.dtype.name == dtype
        np.testing.assert_array_equal(read.astype(np.float32), expected)
        index = shard_index(spec, 1, 2)
        np.testing.assert_array_equal(source.read(spec, index).astype(np.float32), expected[index])
    assert not state


def test_reading_a_slice_copies_nothing(tmp_path):
    write(tmp_path / "model.safetensors", tiny_tensors(ml_dtypes.bfloat16))
    source = open_safetensors(tmp_path, TINY)
    spec = weight_specs(TINY)["embed"]
    one, two = (source.read(spec, (slice(1, 9), slice(0, 64))) for _ in range(2))
    assert np.shares_memory(one, two)
    assert not one.flags.writeable


def broken_folder(tmp_path, **changes):
    """A folder with some tensors replaced; None drops one."""
    tensors = tiny_tensors() | changes
    write(
        tmp_path / "model.safetensors",
        {name: value for name, value in tensors.items() if value is not None},
    )
    return tmp_path


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NORM: None}, rf"tensor '{NORM}' is missing"),
        (
            {NORM: np.ones(63, np.float32)},
            rf"model.safetensors: tensor '{NORM}' has shape \[63\], config.json expects \[64\]",
        ),
        (
            {NORM: np.ones(64, np.int64)},
            rf"tensor '{NORM}' has dtype I64; read are F32, F16, BF16",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)},
            r"'model.layers.0.self_attn.q_proj.bias' has no place",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        open_safetensors(broken_folder(tmp_path, **changes), TINY)


def test_derived_tensors_are_ignored(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    open_safetensors(broken_folder(tmp_path, **extra), TINY)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, kept):
    folder = broken_folder(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*(truncated|too few)"):
        open_safetensors(folder, TINY)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[]",
        b'{"w": {"dtype": "F32", "shape": [2]}}',
        b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
        b'{"w": {"dtype": "I8", "shape": [2], "data_offsets": [8, 6]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}',
    ],
)
def test_a_corrupt_header_is_refused_by_name(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors: corrupt safetensors header"):
        read_safetensors(file)


def test_files_and_tensors_that_the_index_lists_must_be_there(tmp_path):
    tensors = tiny_tensors()
    write(tmp_path / "a.safetensors", tensors)
    shards = dict.fromkeys(tensors, "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    index.write_text(json.dumps({"weight_map": shards}))
    open_safetensors(tmp_path, TINY)
    index.write_text(json.dumps({"weight_map": shards | {NORM: "b.safetensors"}}))
    with pytest.raises(ModelError, match=r"1 of 2 files it lists are missing: b\.safetensors"):
        open_safetensors(tmp_path, TINY)
    index.write_text(json.dumps({"weight_map": shards | {"odd": "a.safetensors"}}))
    with pytest.raises(ModelError, match=r"a\.safetensors: tensor 'odd' is missing"):
        open_safetensors(tmp_path, TINY)
    index.write_text("{}")
    with pytest.raises(ModelError, match="has no 'weight_map'"):
        open_safetensors(tmp_path, TINY)


def test_pickled_checkpoints_are_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled checkpoints can run code"):
        open_safetensors(tmp_path, TINY)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"neither model\.safetensors .*consolidated"):
        open_safetensors(tmp_path, TINY)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "not a list")])
def test_a_broken_config_file_is_named(tmp_path, text, message):
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        read_folder_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=rf"config\.json: .*{message}"):
        read_folder_config(tmp_path)
