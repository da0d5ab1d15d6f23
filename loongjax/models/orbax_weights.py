"""Weights in Orbax's layout, read piece by piece.

A folder of ours has, beside `config.json` and the tokenizer, `weights/` with an Orbax checkpoint
for each part of the model: `embed`, `final_norm`, `lm_head`, and `layers.N` (`loongjax.checkpoint`
writes them; `orbax.checkpoint.PyTreeCheckpointer` reads each as a dict). Arrays lie in chunks, and
a slice reads the chunks that it touches: so each shard of a tensor goes straight to its device.
Read by tensorstore itself, since Orbax gives whole arrays.

Refuses, by name: tensors that are absent, misshapen, unexpected or of another dtype, and chunks
that are missing, which the format takes for zeros. Imports no jax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig
from loongjax.models.weights import Index, WeightSpec, iter_specs, weight_specs

WEIGHTS = "weights"
"""The folder of the parts."""
_DTYPES = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))


def part_of(spec: WeightSpec) -> str:
    """The name of the checkpoint that a tensor is in."""
    return spec.key if spec.layer is None else f"layers.{spec.layer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OrbaxSource:
    """Reads tensors by their place in the tree. Any thread may call it.

    Attributes:
      folder: The model's folder.
      stores: An open tensorstore for each tensor, by its path in the tree.
    """

    folder: Path
    stores: Mapping[str, Any] = field(repr=False)

    def read(self, spec: WeightSpec, index: Index) -> np.ndarray:
        """Part of a tensor; see `WeightSource.read`."""
        try:
            values: np.ndarray = self.stores[spec.path][index].read().result()
        except ValueError as error:
            raise ModelError(
                f"{self.folder}: tensor {spec.path!r} cannot be read; convert the model again "
                f"({error})"
            ) from error
        return values


def open_orbax(folder: Path, config: ModelConfig) -> OrbaxSource:
    """Opens the parts in a model's folder, and checks that they are those of `config`.

    Only headers are read. Raises ModelError, naming the tensor.
    """
    specs = list(iter_specs(weight_specs(config)))
    opening = {spec.path: _open(_place(folder, spec)) for spec in specs}
    stores = {}
    for spec in specs:
        try:
            stores[spec.path] = opening[spec.path].result()
        except ValueError as error:
            raise ModelError(
                f"{folder}: tensor {spec.path!r} is missing or damaged; convert the model again "
                f"({error})"
            ) from error
        _check(folder, spec, stores[spec.path])
    wanted = {_place(folder, spec) for spec in specs}
    for place in _tensors(folder / WEIGHTS):
        if place not in wanted:
            raise ModelError(
                f"{place}: this tensor has no place in the model that config.json describes "
                f"({config.family}, {config.layers} layers); serving without it would give wrong "
                "answers"
            )
    return OrbaxSource(folder=folder, stores=stores)


def _place(folder: Path, spec: WeightSpec) -> Path:
    return folder / WEIGHTS / part_of(spec) / spec.key


def _tensors(weights: Path) -> Iterator[Path]:
    for part in sorted(weights.iterdir()):
        yield from (array.parent for array in sorted(part.glob("*/.zarray")))


def _open(place: Path) -> Any:
    import tensorstore

    return tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{place.absolute()}/"},
            "fill_missing_data_reads": False,
        },
        open=True,
        read=True,
    )


def _check(folder: Path, spec: WeightSpec, store: Any) -> None:
    if tuple(store.shape) != spec.stored_shape:
        raise ModelError(
            f"{folder}: tensor {spec.path!r} has shape {list(store.shape)}, config.json expects "
            f"{list(spec.stored_shape)}"
        )
    if store.dtype.numpy_dtype not in _DTYPES:
        raise ModelError(
            f"{folder}: tensor {spec.path!r} has dtype {store.dtype.name}; read are "
            f"{', '.join(map(str, _DTYPES))}"
        )
