"""The key-value part of a GGUF file, read quickly.

The `gguf` package makes an array of each string's bytes, which takes seconds for a
vocabulary; this reader takes a tenth of one. It reads no tensors.

Refuses, as `ModelError`: files that are not GGUF version 2 or 3, big-endian ones, and
truncated ones.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import TypeAlias

from loongjax.errors import ModelError

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | list["Value"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    code: struct.Struct("<" + letter)
    for code, letter in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
    }.items()
}  # fmt: skip
_HEADER = struct.Struct("<4sIQQ")
_TYPE = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")
_ARRAY_HEADER = struct.Struct("<IQ")


def read_gguf_metadata(path: Path) -> dict[str, Value]:
    """All metadata of a GGUF file, by key.

    Raises:
      ModelError: The file is missing, no GGUF file, or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(data)
    except OSError as error:
        raise ModelError(f"cannot read the GGUF file {path}: {error.strerror}") from error
    except (ValueError, struct.error) as error:  # also from mmap: the file is empty
        raise ModelError(
            f"{path} is no GGUF file that loongjax can read, or it is incomplete: {error}"
        ) from error


def _read(data: mmap.mmap) -> dict[str, Value]:
    magic, version, _, count = _HEADER.unpack_from(data, 0)
    if magic != _MAGIC:
        raise ValueError(f"it begins with {magic!r}, not {_MAGIC!r}")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}; versions {_VERSIONS} (little-endian) are read")
    metadata: dict[str, Value] = {}
    at = _HEADER.size
    for _ in range(count):
        key, at = _read_string(data, at)
        (code,) = _TYPE.unpack_from(data, at)
        metadata[key], at = _read_value(data, at + _TYPE.size, code)
    return metadata


def _read_value(data: mmap.mmap, at: int, code: int) -> tuple[Value, int]:
    """A value of type `code`, and where the next one begins."""
    if code == _STRING:
        return _read_string(data, at)
    if code == _ARRAY:
        return _read_array(data, at)
    number = _NUMBERS.get(code)
    if number is None:
        raise ValueError(f"it holds a value of unknown type {code} at byte {at}")
    return number.unpack_from(data, at)[0], at + number.size


def _read_array(data: mmap.mmap, at: int) -> tuple[list[Value], int]:
    code, count = _ARRAY_HEADER.unpack_from(data, at)
    at += _ARRAY_HEADER.size
    if code in _NUMBERS:
        packed = struct.Struct(f"<{count}{_NUMBERS[code].format[1:]}")
        return list(packed.unpack_from(data, at)), at + packed.size
    values: list[Value] = []
    for _ in range(count):
        value, at = _read_value(data, at, code)
        values.append(value)
    return values, at


def _read_string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = _LENGTH.unpack_from(data, at)
    start = at + _LENGTH.size
    end = start + length
    if end > len(data):
        raise ValueError(
            f"the string at byte {at} would end at {end}; the file has {len(data)} bytes"
        )
    return data[start:end].decode("utf-8"), end
