"""Configs of checkpoints, in both spellings, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import transformers

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig, RopeConfig
from loongjax.models.families import FAMILIES, config_from_hf
from tests.models.hf_reference import CASES, hf_config

# config.json as published, less what has no bearing on the computation.
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN2_WINDOWED = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 32768,
    "max_window_layers": 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "use_sliding_window": True,
    "vocab_size": 151936,
}


def changed(base: dict, **changes) -> dict:
    """A copy with keys replaced, or removed where the new value is `...`."""
    return {k: v for k, v in {**base, **changes}.items() if v is not ...}


def in_old_spelling(config: dict, type_key: str) -> dict:
    """The config as transformers 4 wrote it."""
    rope = dict(config["rope_parameters"])
    old = changed(config, rope_parameters=..., rope_theta=rope.pop("rope_theta"))
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    return old


def test_a_published_config():
    assert config_from_hf(LLAMA_3_1_8B) == ModelConfig(
        family="llama",
        vocab_size=128256,
        width=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        norm_eps=1e-5,
        rope=RopeConfig(
            type="llama3",
            base=500_000.0,
            factor=8.0,
            original_max_position=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        max_positions=131072,
        tied_embeddings=False,
        windows=(None,) * 32,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


@pytest.mark.parametrize("name", CASES)
def test_saved_and_old_spellings_agree(name, tmp_path):
    hf = hf_config(name)
    config = config_from_hf(hf.to_dict())
    hf.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert config_from_hf(saved) == config
    for type_key in ("rope_type", "type"):
        assert config_from_hf(in_old_spelling(hf.to_dict(), type_key)) == config


def test_the_oldest_llama_configs_leave_out_what_was_not_yet_thought_of():
    later = ["rope_scaling", "rope_theta", "num_key_value_heads", "hidden_act"]
    later += ["attention_bias", "mlp_bias", "tie_word_embeddings"]
    config = config_from_hf(changed(LLAMA_3_1_8B, **dict.fromkeys(later, ...)))
    assert config.kv_heads == 32
    assert config.rope == RopeConfig(type="default", base=10_000.0)
    assert not config.tied_embeddings


def test_parts_of_each_family():
    parts = {
        name: (c.qkv_bias, c.o_bias, c.mlp_bias, c.qk_norm, c.windows)
        for name, c in ((name, config_from_hf(hf_config(name).to_dict())) for name in CASES)
    }
    full = (None, None)
    assert parts["llama-mha-untied"] == (False, False, False, False, full)
    assert parts["llama-biases"] == (True, True, True, False, full)
    assert parts["mistral-window"] == (False, False, False, False, (7, 7))
    assert parts["qwen2-tied"] == (True, False, False, False, full)
    assert parts["qwen2-mixed-windows"] == (True, False, False, False, (9, None))
    assert parts["qwen3"] == (False, False, False, True, full)
    assert parts["qwen3-yarn-upper-windows"] == (True, True, False, True, (None, 5))


def test_windows_of_older_qwen_configs_start_at_a_layer():
    assert config_from_hf(QWEN2_WINDOWED).windows == (None, None, None, 4096)
    off = changed(QWEN2_WINDOWED, use_sliding_window=False)
    assert config_from_hf(off).windows == (None,) * 4


def test_mistral_without_window():
    mistral = changed(LLAMA_3_1_8B, architectures=["MistralForCausalLM"], sliding_window=None)
    assert config_from_hf(mistral).windows == (None,) * 32


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (151645,)),
        ({}, (151645,)),
        ({"eos_token_id": None}, (151645,)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [151645, 151643, 151645]}, (151645, 151643)),
    ],
)
def test_end_tokens(generation, expected):
    assert config_from_hf(QWEN2_WINDOWED, generation).eos_ids == expected


def test_end_tokens_of_a_saved_generation_config(tmp_path):
    transformers.GenerationConfig(eos_token_id=[3, 5]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert config_from_hf(QWEN2_WINDOWED, saved).eos_ids == (3, 5)


def test_a_prompt_of_qwen_starts_with_no_extra_token():
    assert config_from_hf(QWEN2_WINDOWED).bos_id is None


def test_yarn_defaults_are_those_of_transformers():
    rope = {"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "mscale": 0}
    config = config_from_hf(changed(LLAMA_3_1_8B, rope_scaling=rope))
    assert config.rope == RopeConfig(
        type="yarn", base=500_000.0, factor=4.0, original_max_position=131072
    )
    ratio = {**rope, "factor": None, "original_max_position_embeddings": 32768}
    config = config_from_hf(changed(LLAMA_3_1_8B, rope_scaling=ratio))
    assert config.rope.factor == 4.0


def test_the_original_context_beside_the_rope_dictionary_wins():
    config = changed(LLAMA_3_1_8B, original_max_position_embeddings=4096)
    assert config_from_hf(config).rope.original_max_position == 4096


LLAMA_REFUSED = {
    "architecture": ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel .*LlamaForCausal"),
    "no architecture": ({"architectures": None}, r"'architectures' is missing.*Qwen3ForCausalLM"),
    "activation": ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantized with 'awq'"),
    "kv heads": ({"num_key_value_heads": 7}, r"\(32\) must be a multiple .* \(7\)"),
    "head size": ({"head_dim": 15}, "even for RoPE, not 15"),
    "width": ({"num_attention_heads": 24}, r"'hidden_size' \(4096\) .* \(24\)"),
    "text for a number": ({"vocab_size": "128256"}, "'vocab_size' must be a whole .*'128256'"),
    "true for a number": ({"num_hidden_layers": True}, "'num_hidden_layers' .* not True"),
    "zero": ({"intermediate_size": 0}, "'intermediate_size' .* >= 1, not 0"),
    "nan": ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' .* not nan"),
    "text for a flag": ({"attention_bias": "no"}, "'attention_bias' must be true or false"),
    "end token": ({"eos_token_id": ["</s>"]}, "'eos_token_id' must be token ids"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE type 'longrope' .*'yarn'"),
    "factor": ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    "yarn factor": ({"rope_scaling": {"type": "yarn"}}, "'factor' is missing"),
    "band": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        "'high_freq_factor' is missing",
    ),
    "by layer type": (
        {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}, "rope_scaling": None},
        r"\['full_attention', 'sliding_attention'\]",
    ),
    "rope list": ({"rope_scaling": ["linear", 2]}, "'rope_parameters' must be an object"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
}


@pytest.mark.parametrize("what", LLAMA_REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(what):
    changes, message = LLAMA_REFUSED[what]
    with pytest.raises(ModelError, match=message):
        config_from_hf(changed(LLAMA_3_1_8B, **changes))


QWEN_REFUSED = {
    "length": ({"layer_types": ["full_attention"]}, "each of the 4 layers"),
    "kind": ({"layer_types": ["chunked_attention"] * 4}, r"\['chunked_attention'\]"),
    "no window": (
        {"layer_types": ["sliding_attention"] * 4, "use_sliding_window": False},
        "'use_sliding_window' is false",
    ),
    "null window": (
        {"layer_types": ["sliding_attention"] * 4, "sliding_window": None},
        "'sliding_window' is missing",
    ),
    "window of 0": ({"sliding_window": 0}, "'sliding_window' must be a whole number >= 1"),
    "layer": ({"max_window_layers": ...}, "'max_window_layers' is missing"),
    "mlp bias": ({"mlp_bias": True}, "'mlp_bias' is true, but Qwen2ForCausalLM has no such bias"),
    "kv heads": ({"num_key_value_heads": ...}, "'num_key_value_heads' is missing"),
    "Qwen3's head size": ({"architectures": ["Qwen3ForCausalLM"]}, "'head_dim' is missing"),
    "Mistral's bias": (
        {"architectures": ["MistralForCausalLM"], "attention_bias": True},
        "'attention_bias' is true, but Mistral",
    ),
    "Mistral's layer types": (
        {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 4},
        "'layer_types' is not part of MistralForCausalLM",
    ),
}


@pytest.mark.parametrize("what", QWEN_REFUSED)
def test_windows_and_parts_that_contradict_are_refused(what):
    changes, message = QWEN_REFUSED[what]
    with pytest.raises(ModelError, match=message):
        config_from_hf(changed(QWEN2_WINDOWED, **changes))


REQUIRED = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
REQUIRED += ["max_position_embeddings", "intermediate_size", "rms_norm_eps"]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key):
    with pytest.raises(ModelError, match=f"'{key}' is missing"):
        config_from_hf(changed(LLAMA_3_1_8B, **{key: ...}))


def test_every_family_is_compared_with_transformers():
    tried = {hf_config(name).architectures[0] for name in CASES}
    assert tried == set(FAMILIES)


def test_reading_configs_does_not_import_jax():
    code = "import sys, loongjax.models.families; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
