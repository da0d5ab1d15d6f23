"""GGUF files: the demo model, files that the `gguf` package writes, and damaged ones."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from hypothesis import given
from hypothesis import strategies as st

from loongjax.errors import ModelError
from loongjax.models.config import RopeConfig
from loongjax.models.demo import fetch_demo
from loongjax.models.gguf import open_gguf
from loongjax.models.gguf_config import config_from_gguf
from loongjax.models.gguf_file import GgufFile, GgufTensor, read_gguf
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.models.weights import iter_specs, read_into, shard_index, weight_specs

TINY = random_config("tiny")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(hf_name):
    for theirs, ours in NAMES.items():
        hf_name = hf_name.replace(theirs, ours)
    return hf_name


def whole(spec):
    return tuple(slice(0, size) for size in spec.stored_shape)


def originals(config):
    source = RandomSource(config=config)
    return {spec: source.read(spec, whole(spec)) for spec in iter_specs(weight_specs(config))}


def to_pairs(values, heads):
    """Rows of Q or K as converters of Llama checkpoints store them."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write(path, config, *, architecture="llama", kind="F32", keys=None, tensors=None):
    """Writes random weights of `config`; matrices as `kind`. `tensors` are changed ones."""
    writer = GGUFWriter(path, architecture)
    metadata = {
        "context_length": config.max_positions,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
    } | (keys or {})
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope.base)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    stored = {}
    for spec, values in originals(config).items():
        if architecture == "llama" and spec.key in ("q", "q_bias"):
            values = to_pairs(values, config.heads)
        if architecture == "llama" and spec.key in ("k", "k_bias"):
            values = to_pairs(values, config.kv_heads)
        stored[gguf_name(spec.hf_name)] = values
    for name, values in (stored | (tensors or {})).items():
        if values is None:
            continue
        quantization = GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(name, quants.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("llama", {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ("qwen2", {"qkv_bias": True, "tied_embeddings": True}),
        ("qwen3", {"qk_norm": True, "head_dim": 32}),
    ],
)
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_was_written_is_read_and_cut(tmp_path, architecture, change, kind):
    config = dataclasses.replace(TINY, **change)
    path = write(tmp_path / "m.gguf", config, architecture=architecture, kind=kind)
    found, source = open_gguf(path)
    assert found == dataclasses.replace(config, family=architecture, eos_ids=(2,))
    expected = originals(config)
    quantization = GGMLQuantizationType[kind]
    for spec in iter_specs(weight_specs(config, tp=2)):
        values = expected[next(one for one in expected if one.path == spec.path)]
        if values.ndim == 2:
            values = quants.dequantize(quants.quantize(values, quantization), quantization)
        for rank in range(2):
            index = shard_index(spec, rank, 2)
            shard = np.full(values[index].shape, np.nan, np.float32)
            read_into(shard, source, spec, index)
            np.testing.assert_array_equal(shard, values[index], err_msg=spec.path)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return open_gguf(write(tmp_path_factory.mktemp("gguf") / "m.gguf", TINY, kind="Q8_0"))[1]


@given(st.data())
def test_any_slice_is_that_part_of_the_whole(quantized, data):
    layer = weight_specs(TINY)["layers"][1]
    spec = layer[data.draw(st.sampled_from(["q", "k", "down"]))]
    index = tuple(
        slice(
            *sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
        )
        for size in spec.shape
    )
    np.testing.assert_array_equal(
        quantized.read(spec, index), quantized.read(spec, whole(spec))[index]
    )


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_types_are_dequantized_as_the_gguf_package_does(tmp_path, kind):
    config = dataclasses.replace(TINY, tied_embeddings=True, width=512)
    path = write(tmp_path / "m.gguf", config, kind="Q8_0")
    # The package writes no K types, so the embedding's bytes are declared to be one.
    quantization = GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 64, quants.quant_shape_to_byte_shape((512, 512), quantization), np.uint8)
    _, source = open_gguf(path)
    embed = GgufTensor(shape=(512, 512), type=quantization, offset=0)
    source = dataclasses.replace(source, tensors={"token_embd.weight": embed}, data=raw.reshape(-1))
    index = (slice(3, 500), slice(200, 300))
    np.testing.assert_array_equal(
        source.read(weight_specs(config)["embed"], index),
        quants.dequantize(raw, quantization)[index],
    )


def test_the_header_is_read_as_the_gguf_package_reads_it(tmp_path):
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("strings", ["a", "ß", ""])
    writer.add_array("floats", [0.5, -1.25])
    writer.add_array("flags", [True, False])
    writer.add_bool("flag", True)
    writer.add_int8("small", -3)
    writer.add_uint64("big", 2**63)
    writer.add_float64("double", 0.1)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("u", np.arange(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf(path), GGUFReader(path)
    fields = {
        name: field.contents() for name, field in theirs.fields.items() if name[:5] != "GGUF."
    }
    assert ours.metadata == fields
    assert ours.tensors == {
        tensor.name: GgufTensor(
            shape=tuple(map(int, tensor.shape[::-1])),
            type=tensor.tensor_type,
            offset=int(tensor.data_offset),
        )
        for tensor in theirs.tensors
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"blk.1.ffn_up.weight": None}}, r"'blk\.1\.ffn_up\.weight' is missing"),
        (
            {"tensors": {"blk.1.ffn_up.weight": np.ones((64, 64), np.float32)}},
            r"'blk\.1\.ffn_up\.weight' has shape \[64, 64\], its metadata implies \[128, 64\]",
        ),
        (
            {"tensors": {"blk.1.ffn_gate_exps.weight": np.ones((64, 64), np.float32)}},
            r"1 tensors have no place .*'blk\.1\.ffn_gate_exps\.weight'",
        ),
        ({"tensors": {"token_embd.weight": None}}, r"'token_embd\.weight' is missing"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "not those of Llama 3"),
    ],
)
def test_files_that_do_not_fit_their_metadata_are_refused(tmp_path, changes, message):
    path = write(tmp_path / "m.gguf", TINY, **changes)
    with pytest.raises(ModelError, match=rf"m\.gguf: .*{message}"):
        open_gguf(path)


def test_types_that_gguf_cannot_dequantize_are_refused_by_name(tmp_path):
    _, source = open_gguf(write(tmp_path / "m.gguf", TINY))
    name, types = "blk.0.ffn_norm.weight", GGMLQuantizationType
    norm = source.tensors[name]
    for kind, called in ((types.F64, "F64"), (999, "999"), (types.Q8_0, "Q8_0")):
        changed = dict(source.tensors) | {name: norm._replace(type=int(kind))}
        with pytest.raises(ModelError, match=rf"'blk\.0\.ffn_norm\.weight' .*{called}"):
            dataclasses.replace(source, tensors=changed).check(TINY)


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 2_000, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, kept):
    path = write(tmp_path / "m.gguf", TINY)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"m\.gguf: "):
        open_gguf(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\3\4 and more bytes than a header", "does not begin with 'GGUF'"),
        (b"GGUF\0\0\0\3" + bytes(16), "version 50331648 is not read"),
        (b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + bytes(8) + b"\xff\0\0\0", "type 255"),
        (b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\1" + bytes(7) + b"\xff", "no UTF-8"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, start, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(start)
    with pytest.raises(ModelError, match=rf"m\.gguf: .*{message}"):
        open_gguf(path)


# --- metadata -------------------------------------------------------------------------

LLAMA3 = RopeConfig(
    type="llama3", base=5e5, factor=8.0, original_max_position=8192, high_freq_factor=4.0
)


def described(architecture="llama", *, general=None, rope_factors=None, **keys):
    """The config of a file with this metadata; `_` in keys of `keys` stand as they are."""
    metadata = {
        "context_length": 131_072,
        "embedding_length": 4096,
        "block_count": 2,
        "feed_forward_length": 14_336,
        "attention.head_count": 32,
        "attention.head_count_kv": 8,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "rope.freq_base": 500_000.0,
    } | keys
    file = GgufFile(
        path=Path("m.gguf"),
        metadata={"general.architecture": architecture}
        | (general or {})
        | {f"{architecture}.{key}": value for key, value in metadata.items()},
        tensors={"token_embd.weight": GgufTensor(shape=(128_256, 4096), type=0, offset=0)},
    )
    return config_from_gguf(file, rope_factors)


def factors(rope, head_dim):
    """The factors that converters write for Llama 3's stretch."""
    values = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * rope.base ** (i / head_dim)
        smooth = (rope.original_max_position / wave - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = min(1.0, max(0.0, smooth))
        values.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.array(values, np.float32)


@pytest.mark.parametrize(("head_dim", "stretch"), [(128, 8.0), (64, 32.0)])
def test_llama3_frequencies_are_recovered_from_their_factors(head_dim, stretch):
    rope = dataclasses.replace(LLAMA3, factor=stretch)
    found = described(
        rope_factors=factors(rope, head_dim), **{"attention.key_length": head_dim}
    ).rope
    assert found.original_max_position == pytest.approx(8192, rel=1e-3)
    assert found.high_freq_factor == pytest.approx(4.0, rel=1e-3)
    np.testing.assert_allclose(factors(found, head_dim), factors(rope, head_dim), rtol=1e-4)


@pytest.mark.parametrize(
    "wrong", [np.linspace(1, 8, 64), np.ones(32), np.full(64, 0.5), np.full(64, 8.0)]
)
def test_other_rotary_factors_are_refused(wrong):
    with pytest.raises(ModelError, match=r"'rope_freqs\.weight' are not those of Llama 3"):
        described(rope_factors=wrong.astype(np.float32))


def test_factors_of_one_change_nothing():
    assert described(rope_factors=np.ones(64, np.float32)).rope == RopeConfig(base=5e5)


def test_rotary_scaling_is_read():
    linear = described(**{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert linear.rope == RopeConfig(type="linear", base=5e5, factor=4.0)
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32_768,
    }
    assert described("qwen3", **yarn).rope == RopeConfig(
        type="yarn", base=5e5, factor=4.0, original_max_position=32_768
    )


def test_tokens_and_windows_are_read():
    ends = {"eos": 9, "bos": 1, "eot": 8}
    general = {f"tokenizer.ggml.{end}_token_id": token for end, token in ends.items()}
    config = described(general=general | {"tokenizer.ggml.model": "llama"})
    assert (config.bos_id, config.eos_ids) == (1, (9, 8))
    config = described(general=general | {"tokenizer.ggml.model": "gpt2"})
    assert config.bos_id is None
    config = described(general=general | {"tokenizer.ggml.add_bos_token": True})
    assert config.bos_id == 1
    config = described(**{"attention.sliding_window": 4096})
    assert (config.family, config.windows) == ("mistral", (4096, 4096))
    assert config.norm_eps == 1e-5  # the float32 is 9.99999974e-06


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("gemma2", {}, "architecture 'gemma2' is not supported; supported are llama, qwen2"),
        ("llama", {"expert_count": 8}, r"llama\.expert_count = 8 is not supported"),
        ("llama", {"rope.dimension_count": 64}, r"rope\.dimension_count = 64 is not supported"),
        ("llama", {"rope.scaling.type": "longrope"}, r"scaling\.type = 'longrope'"),
        ("llama", {"rope.scaling.attn_factor": 0.5}, r"attn_factor = 0\.5"),
        ("qwen2", {"attention.sliding_window": 4096}, r"sliding_window = 4096"),
        ("llama", {"attention.head_count_kv": [8, 4]}, r"must be one number above 0, not \[8, 4\]"),
        ("llama", {"block_count": None}, r"block_count must be one number above 0, not None"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(architecture, keys, message):
    with pytest.raises(ModelError, match=message):
        described(architecture, **keys)


def test_split_files_are_refused():
    with pytest.raises(ModelError, match="part of a split GGUF file of 3 parts"):
        described(general={"split.count": 3})


# --- the demo model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return open_gguf(fetch_demo())


def test_the_demo_model_is_what_it_is_said_to_be(demo):
    config, source = demo
    assert (config.family, config.layers, config.width, config.ffn) == ("llama", 30, 576, 1536)
    assert (config.heads, config.kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_positions, config.rope.base) == (49_152, 8192, 1e5)
    assert config.tied_embeddings
    assert (config.bos_id, config.eos_ids) == (None, (2,))
    for spec in iter_specs(weight_specs(config)):
        if spec.layer in (None, 0, 29):
            values = source.read(spec, whole(spec))
            assert values.shape == spec.shape
            assert values.dtype == np.float32
            assert np.isfinite(values).all()
            assert 0.005 < values.std() < 5, spec.path


def test_reading_holds_the_answer_and_little_more(demo):
    config, source = demo
    spec = weight_specs(config)["embed"]
    tracemalloc.start()
    try:
        values = source.read(spec, whole(spec))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes + 16 * 2**20
