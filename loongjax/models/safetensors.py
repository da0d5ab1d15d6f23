"""Weights from a folder in the Hugging Face layout: config and safetensors files.

Owns the reading of `config.json`, `generation_config.json`, `model.safetensors`, and of
sharded checkpoints with `model.safetensors.index.json`. Files are memory-mapped and read
slice by slice, so that no tensor is in host memory twice and a shard touches its own rows.

Accepts F32, F16 and BF16 (numpy has no bfloat16 of its own, hence the header is read
here). Refuses, by name, pickled checkpoints, other dtypes, tensors that are absent,
misshapen or that the configuration has no place for, and files cut short.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig
from loongjax.models.weights import Index, WeightSpec, iter_specs, weight_specs

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_HEADER_LIMIT = 100_000_000
"""The format's own limit [bytes]."""
_DERIVED = ".rotary_emb.inv_freq"
"""End of the names of tensors that old checkpoints hold and that follow from the config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MappedTensor:
    """Where one tensor lies: its file, the name of its dtype, and its bytes, mapped."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


class _Entry(NamedTuple):
    """A tensor in a header; `start` and `end` count bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetensorsSource:
    """Reads tensors of mapped safetensors files by their Hugging Face names.

    A view that `read` returns is backed by the file, which must not change meanwhile.
    """

    folder: Path
    tensors: Mapping[str, MappedTensor] = field(repr=False)

    def read(self, spec: WeightSpec, index: Index) -> np.ndarray:
        """A read-only view of part of a tensor; see `WeightSource.read`."""
        stored = self._find(spec)
        values: np.ndarray = stored.data.view(_DTYPES[stored.dtype]).reshape(stored.shape)[index]
        return values

    def check(self, config: ModelConfig) -> None:
        """Raises ModelError unless the files hold exactly the tensors of `config`."""
        wanted = {"lm_head.weight"} if config.tied_embeddings else set()
        for spec in iter_specs(weight_specs(config)):
            self._find(spec)
            wanted.add(spec.hf_name)
        for name, stored in self.tensors.items():
            if name not in wanted and not name.endswith(_DERIVED):
                raise ModelError(
                    f"{stored.file}: tensor {name!r} has no place in the model that config.json "
                    f"describes ({config.family}, {config.layers} layers); serving without it "
                    "would give wrong answers. Check config.json against the checkpoint"
                )

    def _find(self, spec: WeightSpec) -> MappedTensor:
        stored = self.tensors.get(spec.hf_name)
        if stored is None:
            raise ModelError(
                f"{self.folder}: tensor {spec.hf_name!r} is missing from the safetensors files "
                f"({len(self.tensors)} tensors); is the checkpoint complete?"
            )
        if stored.dtype not in _DTYPES:
            raise ModelError(
                f"{stored.file}: tensor {spec.hf_name!r} has dtype {stored.dtype}; "
                f"read are {', '.join(_DTYPES)}. Convert the checkpoint to one of them"
            )
        if stored.shape != spec.stored_shape:
            raise ModelError(
                f"{stored.file}: tensor {spec.hf_name!r} has shape {list(stored.shape)}, "
                f"config.json expects {list(spec.stored_shape)}"
            )
        return stored


def read_folder_config(folder: Path) -> ModelConfig:
    """The model that a folder's `config.json` and `generation_config.json` describe.

    Raises ModelError for a missing or malformed file, or an unknown architecture.
    """
    from loongjax.models.families import config_from_hf

    generation = folder / "generation_config.json"
    return config_from_hf(
        _read_json(folder / "config.json"),
        _read_json(generation) if generation.exists() else None,
    )


def open_safetensors(folder: Path, config: ModelConfig) -> SafetensorsSource:
    """Maps a folder's safetensors files and checks every tensor's presence and shape.

    Only headers are read. Raises ModelError, naming the file or the tensor.
    """
    if (folder / _SINGLE).exists():
        tensors = read_safetensors(folder / _SINGLE)
    elif (folder / _INDEX).exists():
        tensors = _read_shards(folder)
    else:
        raise ModelError(_no_weights(folder))
    source = SafetensorsSource(folder=folder, tensors=tensors)
    source.check(config)
    return source


def read_safetensors(file: Path) -> dict[str, MappedTensor]:
    """Maps one safetensors file: its tensors by name. Raises ModelError if it is damaged."""
    size = file.stat().st_size
    if size < 8:
        raise ModelError(f"{file}: {size} bytes are too few for a safetensors file")
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    header_size = int(mapped[:8].view("<u8")[0])
    if header_size > _HEADER_LIMIT or 8 + header_size > size:
        raise ModelError(
            f"{file}: the header is said to have {header_size} bytes and the file has {size}; "
            "it is truncated or no safetensors file"
        )
    entries = _parse_header(file, bytes(mapped[8 : 8 + header_size]))
    data = np.asarray(mapped[8 + header_size :])
    expected = max((entry.end for entry in entries.values()), default=0)
    if expected != data.size:
        raise ModelError(
            f"{file}: truncated or damaged: the header describes {expected} bytes of tensors, "
            f"the file holds {data.size}. Download it again"
        )
    return {
        name: MappedTensor(
            file=file, dtype=entry.dtype, shape=entry.shape, data=data[entry.start : entry.end]
        )
        for name, entry in entries.items()
    }


def _parse_header(file: Path, raw: bytes) -> dict[str, _Entry]:
    try:
        listed = json.loads(raw)
        listed.pop("__metadata__", None)
        entries = {name: _entry(fields) for name, fields in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: corrupt safetensors header: {error!r}") from error
    for name, entry in entries.items():
        known = _DTYPES.get(entry.dtype)
        size = entry.end - entry.start
        wrong = known is not None and size != math.prod(entry.shape) * known.itemsize
        if wrong or entry.start < 0 or size < 0:
            raise ModelError(
                f"{file}: corrupt safetensors header: tensor {name!r} of shape "
                f"{list(entry.shape)} and dtype {entry.dtype} cannot lie in bytes "
                f"{entry.start} to {entry.end}"
            )
    return entries


def _entry(fields: dict[str, Any]) -> _Entry:
    start, end = fields["data_offsets"]
    return _Entry(
        dtype=str(fields["dtype"]),
        shape=tuple(int(size) for size in fields["shape"]),
        start=int(start),
        end=int(end),
    )


def _read_shards(folder: Path) -> dict[str, MappedTensor]:
    index = folder / _INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index}: has no 'weight_map'")
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise ModelError(
            f"{index}: {len(absent)} of {len(shards)} files it lists are missing: "
            f"{_some(absent)}. Download them again"
        )
    stored = {name: read_safetensors(folder / name) for name in shards}
    for tensor, name in weight_map.items():
        if tensor not in stored[name]:
            raise ModelError(f"{folder / name}: tensor {tensor!r} is missing; {index} lists it")
    return {tensor: stored[name][tensor] for tensor, name in weight_map.items()}


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: {_some(pickles)}: pickled checkpoints can run code when they are "
            "loaded and are not read; convert them to safetensors"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f" (found {_some(others)})" if others else ""
    return f"{folder}: neither {_SINGLE} nor {_INDEX} is there{found}"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: not found; a model folder needs it") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: must hold an object, not a {type(value).__name__}")
    return value


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
