"""The quick reader agrees with the `gguf` package, and names what is wrong with a file."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest

from loongjax.errors import ModelError
from loongjax.text.gguf_metadata import read_gguf_metadata


def test_every_type_of_value_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Ġcafé")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("fractions", [0.5, -1.5])
    writer.add_array("flags", [True, False])
    writer.add_array("strings", ["a", "", "日本"])
    writer.add_array("nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    metadata = read_gguf_metadata(path)

    fields = gguf.GGUFReader(path).fields
    expected = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    expected["nested"] = [[1, 2], [3]]  # the package flattens it
    assert metadata == expected
    assert metadata["yes"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"GGUF\x03\x00", "incomplete"),
        (b"PK\x03\x04" + bytes(40), "begins with b'PK"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version is 1"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "little-endian"),
        (struct.pack("<4sIQQQ3sII", b"GGUF", 3, 0, 1, 3, b"key", 99, 0), "unknown type 99"),
        (struct.pack("<4sIQQQ3sIQ2s", b"GGUF", 3, 0, 1, 3, b"key", 8, 50, b"ab"), "string at byte"),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_gguf_metadata(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf: No such file"):
        read_gguf_metadata(tmp_path / "absent.gguf")
