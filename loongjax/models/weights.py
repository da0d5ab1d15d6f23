"""The weight tree: which tensors a model has, their shapes, and how they are cut.

Owns one description of the weights (`_TOP`, `_LAYER`), from which come the names in
checkpoints, the shapes, and the axis that tensor parallelism cuts; and the protocol by
which any store of weights is read. Every linear weight is `[out, in]`, as in checkpoints.

Promises: a source is only asked for what a device holds, and only for rows that exist:
the padding of the vocabulary is added here. Imports no jax.
Not here: file formats (`safetensors`, `gguf`), devices (`placement`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig

_BLOCK_VALUES = 1 << 21
"""Values that are read at once: 8 MiB of float32."""
_BLOCK_ROWS = 256
"""Blocks are so many rows, or a multiple: random weights are drawn by as many."""

Index: TypeAlias = tuple[slice, ...]
"""One slice with start and stop, not empty, for each axis of a tensor."""

Tree: TypeAlias = dict[str, Any]
"""A nested dict; `layers` is a tuple of dicts, or one dict of stacked leaves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """One tensor of a model.

    Attributes:
      key: Its name in its dict of the tree, such as `q`.
      layer: The layer it belongs to, or None.
      hf_name: Its name in a Hugging Face checkpoint.
      stored_shape: Its shape in the checkpoint.
      shape: Its shape on the devices, all `tp` shards together: `stored_shape`, with the
        rows of the vocabulary padded to a multiple of tp.
      tp_axis: The axis cut over the `tp` devices of an instance; None: each holds all.
    """

    key: str
    layer: int | None
    hf_name: str
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    tp_axis: int | None

    @property
    def path(self) -> str:
        """Where it stands in the tree, such as `layers.3.q`."""
        return self.key if self.layer is None else f"layers.{self.layer}.{self.key}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LeafSpec:
    """One leaf of the tree as devices hold it: a tensor, or one tensor of every layer.

    Attributes:
      tensors: What it is made of; more than one, or `stacked`, adds a leading layer axis.
      stacked: Whether the leaf has that axis.
    """

    tensors: tuple[WeightSpec, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, all `tp` shards together."""
        shape = self.tensors[0].shape
        return (len(self.tensors), *shape) if self.stacked else shape

    @property
    def tp_axis(self) -> int | None:
        """The axis of `shape` that is cut over `tp`, or None."""
        axis = self.tensors[0].tp_axis
        return axis if axis is None or not self.stacked else axis + 1

    def shard_shape(self, tp: int) -> tuple[int, ...]:
        """The shape that one of `tp` devices holds."""
        return tuple(
            size // tp if axis == self.tp_axis else size for axis, size in enumerate(self.shape)
        )


@runtime_checkable
class WeightSource(Protocol):
    """A store of weights that is read piece by piece."""

    def read(self, spec: WeightSpec, index: Index) -> np.ndarray:
        """The part `index` of a tensor; `index` lies within `spec.stored_shape`.

        Returns the stored values in a floating dtype (bfloat16 is ml_dtypes'), with the
        axes that `index` has. It may be a read-only view of a file: copy to keep it.
        Raises ModelError when the tensor is absent, misshapen, or of an unknown dtype.
        """
        ...


class _Row(NamedTuple):
    """One line of the description: `when` names the field of ModelConfig that it needs."""

    key: str
    hf_name: str
    sizes: str
    tp_axis: int | None
    when: str | None = None


# Letters of `sizes`: V vocabulary, M width, Q = H * D, K = G * D, D head size, F inner size.
_TOP = (
    _Row("embed", "model.embed_tokens.weight", "VM", 0),
    _Row("final_norm", "model.norm.weight", "M", None),
)
_LM_HEAD = _Row("lm_head", "lm_head.weight", "VM", 0)
_LAYER = (
    _Row("attn_norm", "input_layernorm.weight", "M", None),
    _Row("q", "self_attn.q_proj.weight", "QM", 0),
    _Row("k", "self_attn.k_proj.weight", "KM", 0),
    _Row("v", "self_attn.v_proj.weight", "KM", 0),
    _Row("o", "self_attn.o_proj.weight", "MQ", 1),
    _Row("q_bias", "self_attn.q_proj.bias", "Q", 0, "qkv_bias"),
    _Row("k_bias", "self_attn.k_proj.bias", "K", 0, "qkv_bias"),
    _Row("v_bias", "self_attn.v_proj.bias", "K", 0, "qkv_bias"),
    _Row("o_bias", "self_attn.o_proj.bias", "M", None, "o_bias"),
    _Row("q_norm", "self_attn.q_norm.weight", "D", None, "qk_norm"),
    _Row("k_norm", "self_attn.k_norm.weight", "D", None, "qk_norm"),
    _Row("mlp_norm", "post_attention_layernorm.weight", "M", None),
    _Row("gate", "mlp.gate_proj.weight", "FM", 0),
    _Row("up", "mlp.up_proj.weight", "FM", 0),
    _Row("down", "mlp.down_proj.weight", "MF", 1),
    _Row("gate_bias", "mlp.gate_proj.bias", "F", 0, "mlp_bias"),
    _Row("up_bias", "mlp.up_proj.bias", "F", 0, "mlp_bias"),
    _Row("down_bias", "mlp.down_proj.bias", "M", None, "mlp_bias"),
)


def weight_specs(config: ModelConfig, tp: int = 1) -> Tree:
    """The tree of tensors of a model: a nested dict, `layers` a tuple of one dict a layer.

    Raises ConfigError when tp does not divide the heads, the KV heads, or the MLP.
    """
    check_tensor_parallel(config, tp)
    sizes = {
        "V": config.vocab_size,
        "M": config.width,
        "Q": config.heads * config.head_dim,
        "K": config.kv_heads * config.head_dim,
        "D": config.head_dim,
        "F": config.ffn,
    }
    padded = sizes | {"V": -(-config.vocab_size // tp) * tp}

    def spec(row: _Row, layer: int | None) -> WeightSpec:
        prefix = "" if layer is None else f"model.layers.{layer}."
        return WeightSpec(
            key=row.key,
            layer=layer,
            hf_name=prefix + row.hf_name,
            stored_shape=tuple(sizes[letter] for letter in row.sizes),
            shape=tuple(padded[letter] for letter in row.sizes),
            tp_axis=row.tp_axis,
        )

    top = _TOP if config.tied_embeddings else (*_TOP, _LM_HEAD)
    rows = [row for row in _LAYER if row.when is None or getattr(config, row.when)]
    tree: Tree = {row.key: spec(row, None) for row in top}
    tree["layers"] = tuple(
        {row.key: spec(row, layer) for row in rows} for layer in range(config.layers)
    )
    return tree


def weight_leaves(config: ModelConfig, tp: int, *, stacked: bool) -> Tree:
    """The tree of leaves that devices hold: as `weight_specs`, or with the layers stacked.

    Raises ConfigError as `weight_specs` does.
    """
    specs = weight_specs(config, tp)
    layers: tuple[dict[str, WeightSpec], ...] = specs.pop("layers")

    def alone(spec: WeightSpec) -> LeafSpec:
        return LeafSpec(tensors=(spec,), stacked=False)

    tree: Tree = {key: alone(spec) for key, spec in specs.items()}
    if stacked:
        tree["layers"] = {
            key: LeafSpec(tensors=tuple(layer[key] for layer in layers), stacked=True)
            for key in layers[0]
        }
    else:
        tree["layers"] = tuple(
            {key: alone(spec) for key, spec in layer.items()} for layer in layers
        )
    return tree


def iter_specs(specs: Tree) -> Iterator[WeightSpec]:
    """The tensors of a tree that `weight_specs` made."""
    for value in specs.values():
        if isinstance(value, WeightSpec):
            yield value
        else:
            for layer in value:
                yield from layer.values()


def shard_index(spec: WeightSpec, rank: int, tp: int) -> Index:
    """The part of `spec.shape` that device `rank` of `tp` holds."""
    parts = []
    for axis, size in enumerate(spec.shape):
        share = size // tp if axis == spec.tp_axis else size
        start = rank * share if axis == spec.tp_axis else 0
        parts.append(slice(start, start + share))
    return tuple(parts)


def iter_blocks(index: Index) -> Iterator[Index]:
    """A part of a tensor in blocks of whole rows, of about `_BLOCK_VALUES` values each."""
    rows, *others = index
    width = math.prod(part.stop - part.start for part in others)
    step = max(1, _BLOCK_VALUES // width // _BLOCK_ROWS) * _BLOCK_ROWS
    for start in range(rows.start, rows.stop, step):
        yield (slice(start, min(start + step, rows.stop)), *others)


def read_into(out: np.ndarray, source: WeightSource, spec: WeightSpec, index: Index) -> None:
    """Fills `out` with the part `index` of `spec.shape`, in the dtype of `out`.

    Rows that only pad the vocabulary become zero, and are not asked of the source. Beside `out`,
    memory holds what the source gives for a block.
    """
    stored = tuple(
        slice(part.start, max(part.start, min(part.stop, size)))
        for part, size in zip(index, spec.stored_shape, strict=True)
    )
    first = stored[0].start
    out[stored[0].stop - first :] = 0
    for block in iter_blocks(stored):
        rows = slice(block[0].start - first, block[0].stop - first)
        np.copyto(out[rows], source.read(spec, block), casting="unsafe")


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Raises ConfigError where a model cannot be cut into so many parts."""
    if tp < 1:
        raise ConfigError(f"tp must be at least 1, not {tp}")
    for what, number in (
        ("attention heads", config.heads),
        ("KV heads", config.kv_heads),
        ("MLP inner size", config.ffn),
    ):
        if number % tp:
            raise ConfigError(
                f"tp={tp} does not divide the model's {what} ({number}); "
                f"choose a tp that divides {config.heads} heads, {config.kv_heads} KV heads "
                f"and an MLP of {config.ffn}"
            )
