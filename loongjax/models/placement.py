"""Weights onto devices: every elastic instance gets a full replica, cut over its tp devices.

Owns the loading loop and the choice between stacked and separate layers. Each tensor, or
shard of one, is read once and put on every instance; then the host's copy is dropped.
Peak host memory beyond what the devices hold is one leaf's shard in the serving dtype,
plus a block of it as the source gives it; a stacked leaf is one tensor of all layers.

On CPU the devices of a process share one copy: jax adopts a host buffer that is aligned
to 64 bytes instead of copying it (measured on jax 0.10.2: at 64 for every device, at 32
and below for none). It is safe because the buffer is made here, never written again, and
held by the arrays. Such arrays must not be donated.
Not here: which tensors there are (`weights`), views of groups (`loongjax.cluster`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig
from loongjax.models.weights import (
    LeafSpec,
    Tree,
    WeightSource,
    read_into,
    shard_index,
    weight_leaves,
)

_ALIGNMENT = 64
_PROGRESS_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedLeaf:
    """A leaf on the devices. A leaf to `jax.tree.map`, too.

    Attributes:
      spec: Its shape and cut.
      shards: `shards[instance][tp_rank]`, each a single-device array of
        `spec.shard_shape(tp)`.
    """

    spec: LeafSpec
    shards: tuple[tuple[jax.Array, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedWeights:
    """All weights of a model on all instances.

    Attributes:
      tree: The weight tree with a `PlacedLeaf` at every leaf.
      stacked: Whether `tree["layers"]` is one dict of stacked leaves, not a tuple of dicts.
      dtype: Of every array.
    """

    tree: Tree
    stacked: bool
    dtype: np.dtype


def stacks_layers(platform: str) -> bool:
    """Whether the layers of a model are stacked into one leaf and scanned over.

    On TPU they are: few arguments to a launch, one body to compile. Elsewhere XLA copies each
    layer out of the stack before it multiplies. On GPU that is three times the traffic of a
    decode step, which is bound by reading weights. On CPU it made decoding 2 to 5 times slower
    (a whole bfloat16 stack is converted to float32 and back at every step, too).
    """
    return platform == "tpu"


def place_weights(
    config: ModelConfig,
    source: WeightSource,
    devices: Sequence[Sequence[jax.Device]],
    dtype: Any,
    *,
    stacked: bool,
) -> PlacedWeights:
    """Reads a model once and puts it on every instance; blocks until it is there.

    `devices[instance][tp_rank]`; every instance has the same number. `dtype` is a floating
    dtype. Raises ConfigError when tp does not divide the model, ModelError when the
    source fails.
    """
    tp = len(devices[0]) if devices else 0
    if tp == 0 or any(len(row) != tp for row in devices):
        raise ConfigError(
            "every instance needs the same number of devices, at least one; got "
            f"{[len(row) for row in devices]}"
        )
    leaves = weight_leaves(config, tp, stacked=stacked)
    progress = _Progress(sum(len(leaf.tensors) for leaf in jax.tree.leaves(leaves)))

    def place(leaf: LeafSpec) -> PlacedLeaf:
        placed = _place_leaf(leaf, source, devices, np.dtype(dtype))
        progress.add(len(leaf.tensors), math.prod(leaf.shape) * np.dtype(dtype).itemsize)
        return placed

    tree = jax.tree.map(place, leaves)
    progress.finish(len(devices))
    return PlacedWeights(tree=tree, stacked=stacked, dtype=np.dtype(dtype))


def _place_leaf(
    leaf: LeafSpec, source: WeightSource, devices: Sequence[Sequence[jax.Device]], dtype: np.dtype
) -> PlacedLeaf:
    tp = len(devices[0])
    columns: dict[int, list[jax.Array]] = {}
    for rank in range(tp) if leaf.tp_axis is not None else range(1):
        host = _aligned_empty(leaf.shard_shape(tp), dtype)
        for layer, spec in enumerate(leaf.tensors):
            part = host[layer] if leaf.stacked else host
            read_into(part, source, spec, shard_index(spec, rank, tp))
        host.flags.writeable = False  # on CPU the arrays below may be this very memory
        for held_by in range(tp) if leaf.tp_axis is None else (rank,):
            columns[held_by] = [jax.device_put(host, row[held_by]) for row in devices]
            for array in columns[held_by]:  # transfers in flight would pile up host buffers
                array.block_until_ready()
    return PlacedLeaf(
        spec=leaf, shards=tuple(zip(*(columns[rank] for rank in range(tp)), strict=True))
    )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An unset array that begins at a multiple of `_ALIGNMENT` bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class _Progress:
    """Tells the log how far loading is, now and then."""

    def __init__(self, tensors: int) -> None:
        self._tensors = tensors
        self._done = 0
        self._bytes = 0
        self._began = self._told = time.monotonic()

    def add(self, tensors: int, size: int) -> None:
        self._done += tensors
        self._bytes += size
        if time.monotonic() - self._told >= _PROGRESS_S:
            self._told = time.monotonic()
            _log.info("weights: %d of %d tensors", self._done, self._tensors)

    def finish(self, instances: int) -> None:
        _log.info(
            "weights: %d tensors, %.0f MB, on %d instances in %.1f s",
            self._tensors,
            self._bytes / 1e6,
            instances,
            time.monotonic() - self._began,
        )
