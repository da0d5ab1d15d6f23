"""What a checkpoint is written in: pieces that are there whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import ml_dtypes
import numpy as np

from loongjax.models.weights import WeightSource, WeightSpec

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[Dtype, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Tensors that are written together, and the name of what holds them."""

    name: str
    tensors: tuple[WeightSpec, ...]


@runtime_checkable
class Writer(Protocol):
    """One layout of weights in a folder."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """All pieces, in the order in which they are written."""
        ...

    def is_there(self, piece: Piece) -> bool:
        """Whether an earlier run wrote it."""
        ...

    def write(self, piece: Piece) -> None:
        """Writes it; a process that dies meanwhile leaves none of it."""
        ...

    def finish(self) -> None:
        """Writes what names the pieces, when all are there."""
        ...


def dtype_of(source: WeightSource, spec: WeightSpec, dtype: Dtype | None) -> np.dtype:
    """The dtype to write a tensor in; None: the one that its source gives."""
    if dtype is not None:
        return DTYPES[dtype]
    first = tuple(slice(0, 1 if axis == 0 else n) for axis, n in enumerate(spec.stored_shape))
    return source.read(spec, first).dtype


def write_whole(path: Path, text: str) -> None:
    """Writes a small file, so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
