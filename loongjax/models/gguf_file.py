"""The GGUF container: metadata and where each tensor lies. Nothing of what they mean.

Owns the parsing of the header, so that a file opens in a fraction of the time that the
`gguf` package takes (0.1 s against 2 s for a vocabulary of 49,152), and so that a damaged
file is refused with its name. Tensor data stays on disk, mapped.

Accepts versions 2 and 3, little-endian. Imports neither jax nor `gguf`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loongjax.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_LENGTH = struct.Struct("<Q")
_DEFAULT_ALIGNMENT = 32


class GgufTensor(NamedTuple):
    """A tensor in the file.

    shape: rows first (the file has columns first); type: its ggml type number; offset:
    its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """A GGUF file whose header was read.

    Attributes:
      path: The file.
      metadata: Every key with its value: a number, a bool, a string, or a list of them.
      tensors: Every tensor by its name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Reads a file's header. Raises ModelError if it is no GGUF file, or damaged."""
    cursor = _Cursor(path)
    if cursor.take(4) != _MAGIC:
        raise ModelError(f"{path}: no GGUF file (it does not begin with 'GGUF')")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ModelError(
            f"{path}: GGUF version {version} is not read (a big-endian file shows as a huge "
            f"number); versions {' and '.join(map(str, _VERSIONS))}, little-endian, are"
        )
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    listed = [(cursor.string(), cursor.tensor()) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelError(f"{path}: damaged: general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    return GgufFile(
        path=path,
        metadata=metadata,
        tensors={name: tensor._replace(offset=start + tensor.offset) for name, tensor in listed},
    )


class _Cursor:
    """Reads the header from front to back, never past the file's end."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"{path}: cannot be read as a GGUF file: {error}") from error
        self._path = path
        self._bytes = memoryview(mapped)
        self.position = 0

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self._bytes):
            raise self._cut_short(end)
        part = self._bytes[self.position : end]
        self.position = end
        return part

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Texts, each after its length; one loop, for a vocabulary has 100,000 of them."""
        texts = []
        at, end = self.position, len(self._bytes)
        try:
            for _ in range(count):
                start = at + _LENGTH.size
                at = start + _LENGTH.unpack_from(self._bytes, at)[0] if start <= end else start
                if at > end:
                    raise self._cut_short(at)
                texts.append(str(self._bytes[start:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise ModelError(
                f"{self._path}: damaged: the text before byte {at} is no UTF-8"
            ) from error
        self.position = at
        return texts

    def _cut_short(self, end: int) -> ModelError:
        return ModelError(
            f"{self._path}: truncated or damaged: the header goes on to byte {end}, the file has "
            f"{len(self._bytes)}. Download it again"
        )

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _ARRAY:
            item, count = self.number("I"), self.number("Q")
            if item in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[item])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            if item == _STRING:
                return self.strings(count)
        raise ModelError(
            f"{self._path}: damaged: unknown type {kind} of a metadata value before byte "
            f"{self.position}"
        )

    def tensor(self) -> GgufTensor:
        axes = self.number("I")
        columns_first = struct.unpack(f"<{axes}Q", self.take(8 * axes))
        kind, offset = self.number("I"), self.number("Q")
        return GgufTensor(shape=columns_first[::-1], type=kind, offset=offset)
