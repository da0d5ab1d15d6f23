"""The decoder computes what transformers computes, however it is laid out."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from loongjax.errors import ConfigError, ModelError
from loongjax.models.config import ModelConfig
from loongjax.models.decoder import Decoder
from loongjax.models.rope import frequencies
from loongjax.models.weights import LeafSpec, weight_leaves
from tests.models.hf_reference import (
    CASES,
    TOKENS,
    causal_attend,
    prompt,
    reference,
    relative_error,
    stacked,
    tree,
)

TOLERANCE = 1e-4  # relative, float32: DESIGN's invariant


def run(config, weights, tokens, *, first=0, tp=1, attend=causal_attend):
    """Logits of all tokens, and how often each layer attended."""
    decoder = Decoder(config, tp)
    positions = first + jnp.arange(len(tokens), dtype=jnp.int32)
    calls = jnp.zeros(config.layers, jnp.int32)
    x_TxM, calls = decoder.apply({"params": weights}, tokens, positions, attend, calls)
    assert x_TxM.dtype == weights["embed"].dtype
    return decoder.apply({"params": weights}, x_TxM, method="logits"), calls


jit_run = jax.jit(run, static_argnames=("config", "first", "tp", "attend"))


# One of each kind of layer is enough for the scan, which differs only in how it walks them.
STACKED = [
    "llama-biases",
    "llama-gqa-tied-llama3",
    "mistral-window",
    "qwen2-mixed-windows",
    "qwen3",
]


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "unrolled") for name in CASES] + [(name, "stacked") for name in STACKED],
)
def test_logits_are_those_of_transformers(name, layout, record_property):
    ref = reference(name)
    tokens = prompt(ref.config)
    weights = stacked(ref.weights) if layout == "stacked" else ref.weights
    logits, calls = jit_run(ref.config, weights, tokens)
    error = relative_error(logits, ref.logits(tokens, np.arange(TOKENS)))
    record_property("relative_error", error)
    print(f"{name}, {layout}: relative error {error:.1e}")
    assert logits.shape == (TOKENS, ref.config.vocab_size)
    assert logits.dtype == jnp.float32
    assert error < TOLERANCE
    np.testing.assert_array_equal(calls, 1)


def test_logits_far_into_the_context():
    ref = reference("lwm-mqa")
    first = 1_000_000
    # At this distance one unit in the last place of a frequency turns by 0.06 rad, so the
    # comparison only makes sense where both sides have the same ones.
    ours = frequencies(ref.config.rope, ref.config.head_dim).inverse
    np.testing.assert_array_equal(ours, ref.model.model.rotary_emb.inv_freq.numpy())
    tokens = prompt(ref.config)
    logits, _ = jit_run(ref.config, ref.weights, tokens, first=first)
    want = ref.logits(tokens, first + np.arange(TOKENS))
    assert relative_error(logits, want) < TOLERANCE
    assert relative_error(logits, ref.logits(tokens, np.arange(TOKENS))) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("windows", (None, None)),
        ("windows", (8, None)),
        ("qkv_bias", False),
        ("norm_eps", 1e-2),
    ],
)
def test_the_comparison_sees_each_part(field, value):
    """Guards the guard: a model that is wrong in one part is found out."""
    ref = reference("qwen2-mixed-windows")
    tokens = prompt(ref.config)
    wrong = dataclasses.replace(ref.config, **{field: value})
    logits, _ = jit_run(wrong, ref.weights, tokens)
    assert relative_error(logits, ref.logits(tokens, np.arange(TOKENS))) > 10 * TOLERANCE


def run_tp(config: ModelConfig, tokens, state, *, layout, check_vma=True):
    """`run` over a mesh of two devices, with weights cut as `weight_leaves` says."""
    weights = tree(config, state, tp=2)
    weights = stacked(weights) if layout == "stacked" else weights
    specs = jax.tree.map(
        lambda leaf: P() if leaf.tp_axis is None else P(*[None] * leaf.tp_axis, "tp"),
        weight_leaves(config, 2, stacked=layout == "stacked"),
        is_leaf=lambda leaf: isinstance(leaf, LeafSpec),
    )
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("sp", "tp"))
    program = jax.shard_map(
        lambda w, t: run(config, w, t, tp=2),
        mesh=mesh,
        in_specs=(specs, P()),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    return jax.jit(program)(weights, tokens)


@pytest.mark.parametrize(
    ("name", "layout", "check_vma"),
    [
        ("llama-biases", "unrolled", True),
        ("llama-biases", "stacked", True),
        ("llama-biases", "unrolled", False),
        ("llama-gqa-tied-llama3", "unrolled", True),
        ("qwen2-mixed-windows", "stacked", True),
        ("qwen3", "unrolled", True),
    ],
)
def test_tensor_parallel_gives_the_same(name, layout, check_vma):
    ref = reference(name)
    tokens = prompt(ref.config)
    state = {key: value.numpy() for key, value in ref.model.state_dict().items()}
    logits, calls = run_tp(ref.config, tokens, state, layout=layout, check_vma=check_vma)
    alone, _ = jit_run(ref.config, ref.weights, tokens)
    vocab = ref.config.vocab_size
    assert logits.shape == (TOKENS, vocab + 1)  # 163 rows, padded to two equal shares
    assert relative_error(logits[:, :vocab], alone) < TOLERANCE
    np.testing.assert_array_equal(logits[:, vocab:], -np.inf)
    np.testing.assert_array_equal(calls, 1)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_activations_have_the_dtype_of_the_weights(layout):
    ref = reference("qwen3")
    tokens = prompt(ref.config)
    weights = stacked(ref.weights) if layout == "stacked" else ref.weights
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    seen = []

    def attend(state, *, q_TxHxD, k_TxGxD, v_TxGxD, **at):
        seen.extend(array.dtype for array in (q_TxHxD, k_TxGxD, v_TxGxD))
        o_TxHxD, state = causal_attend(
            state, q_TxHxD=q_TxHxD, k_TxGxD=k_TxGxD, v_TxGxD=v_TxGxD, **at
        )
        return o_TxHxD, state  # float32, as a merge of partials gives it

    logits, _ = jit_run(ref.config, weights, tokens, attend=attend)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits; errors of a few units add up over the layers.
    assert relative_error(logits, ref.logits(tokens, np.arange(TOKENS))) < 16 * 2**-8


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
@pytest.mark.parametrize(
    ("windows", "static"),
    [((None, None), True), ((7, 7), True), ((None, 7), False)],
)
def test_window_is_a_python_value_unless_a_scan_mixes_them(layout, windows, static):
    ref = reference("llama-mha-untied")
    config = dataclasses.replace(ref.config, windows=windows)
    weights = stacked(ref.weights) if layout == "stacked" else ref.weights
    seen = []

    def attend(state, *, window, **rest):
        seen.append(window)
        return causal_attend(state, window=window, **rest)

    jit_run.eval_shape(config, weights, prompt(config), attend=attend)
    if layout == "unrolled":
        assert tuple(seen) == tuple(dict.fromkeys(windows))  # once for all layers alike
    elif static:
        assert set(seen) == {windows[0]}
    else:
        assert all(window.dtype == jnp.int32 and window.shape == () for window in seen)


@pytest.mark.parametrize("layout", ["unrolled", "stacked"])
def test_a_wrong_number_of_layers_is_refused(layout):
    ref = reference("llama-mha-untied")
    weights = {**ref.weights, "layers": ref.weights["layers"][:1]}
    weights = stacked(weights) if layout == "stacked" else weights
    with pytest.raises(ModelError, match="weights have 1 layers, the config 2"):
        jit_run(ref.config, weights, prompt(ref.config))


def test_a_tp_that_does_not_divide_the_heads_is_refused():
    ref = reference("lwm-mqa")
    with pytest.raises(ConfigError, match=r"tp=2 .* KV heads \(1\)"):
        jit_run(ref.config, ref.weights, prompt(ref.config), tp=2)


def test_a_token_outside_the_vocabulary_gives_no_nan():
    ref = reference("llama-mha-untied")
    logits, _ = jit_run(ref.config, ref.weights, np.array([-1, 2**31 - 1], np.int32))
    assert np.isfinite(logits).all()
