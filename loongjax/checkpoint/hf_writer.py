"""Weights as safetensors files in the Hugging Face layout, with an index where there are several.

Memory: a block of a tensor. Files are cut at about `_FILE_BYTES`, between tensors. Imports no jax.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loongjax.checkpoint.pieces import DTYPES, Dtype, Piece, dtype_of, write_whole
from loongjax.models.weights import WeightSource, WeightSpec, iter_blocks

_FILE_BYTES = 5_000_000_000
_NAMES = {DTYPES["float32"]: "F32", DTYPES["float16"]: "F16", DTYPES["bfloat16"]: "BF16"}


class HfWriter:
    """See `Writer`."""

    def __init__(
        self,
        folder: Path,
        source: WeightSource,
        specs: Sequence[WeightSpec],
        dtype: Dtype | None,
    ) -> None:
        self._folder, self._source = folder, source
        self._dtypes = {spec.path: dtype_of(source, spec, dtype) for spec in specs}
        files: list[list[WeightSpec]] = [[]]
        size = 0
        for spec in specs:
            if files[-1] and size + self._bytes(spec) > _FILE_BYTES:
                files.append([])
                size = 0
            files[-1].append(spec)
            size += self._bytes(spec)
        self.pieces = tuple(
            Piece(name=_name(i, len(files)), tensors=tuple(tensors))
            for i, tensors in enumerate(files)
        )

    def is_there(self, piece: Piece) -> bool:
        """A file gets its name when it is whole."""
        return (self._folder / piece.name).is_file()

    def write(self, piece: Piece) -> None:
        """See `Writer.write`."""
        part = self._folder / f".{piece.name}.part"
        with part.open("wb") as stream:
            stream.write(self._header(piece))
            for spec in piece.tensors:
                for index in iter_blocks(tuple(slice(0, size) for size in spec.stored_shape)):
                    values = self._source.read(spec, index).astype(self._dtypes[spec.path])
                    stream.write(np.ascontiguousarray(values).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(self._folder / piece.name)

    def finish(self) -> None:
        """Writes the index, if there are several files."""
        if len(self.pieces) == 1:
            return
        index = {
            "metadata": {"total_size": sum(map(self._bytes, self._all()))},
            "weight_map": {
                spec.hf_name: piece.name for piece in self.pieces for spec in piece.tensors
            },
        }
        write_whole(self._folder / "model.safetensors.index.json", json.dumps(index, indent=2))

    def _all(self) -> list[WeightSpec]:
        return [spec for piece in self.pieces for spec in piece.tensors]

    def _bytes(self, spec: WeightSpec) -> int:
        return math.prod(spec.stored_shape) * self._dtypes[spec.path].itemsize

    def _header(self, piece: Piece) -> bytes:
        """Its length in 8 bytes, and where each tensor lies, filled up to whole 8 bytes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for spec in piece.tensors:
            end = start + self._bytes(spec)
            header[spec.hf_name] = {
                "dtype": _NAMES[self._dtypes[spec.path]],
                "shape": list(spec.stored_shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _name(index: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{index + 1:05}-of-{count:05}.safetensors"
