"""Compiled programs on disk: one file each, named by the digest of its whole key.

A file is three parts: a line with the format and the SHA-256 of all that follows; a line of
JSON, the header: the whole key (platform, versions, CPU features and so on), the devices that
the program was compiled for, and the memory that it takes; and the serialized program. All
of it is checked before a byte of the program is looked at. What is damaged, of another key,
for another number of devices, or could have been written by somebody else is not used, and
the log says so.

The digest finds damage, not malice: who can write the file can write the digest. Against
that there is `ProgramFolder`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loongjax.programs.folder import ProgramFolder

_FORMAT = b"loongjax-program-2"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredProgram:
    """A serialized program.

    Attributes:
      data: As `loongjax.programs.rebind` makes it.
      compiled_for: The ids of the devices that it was compiled for, in mesh order.
      temporary_bytes: What it takes on each device while it runs; None where jax cannot say.
      code_bytes: What its code takes on each device; None likewise.
    """

    data: bytes
    compiled_for: tuple[int, ...]
    temporary_bytes: int | None = None
    code_bytes: int | None = None


class ProgramStore:
    """Programs in the user's own folder and, if there is one, in a trusted library."""

    def __init__(self, folder: Path, trusted: Path | None = None) -> None:
        """`trusted` is only read. Raises ConfigError as `ProgramFolder`."""
        self.folder = ProgramFolder(folder)
        self.trusted = None if trusted is None else ProgramFolder(trusted, trusted=True)

    def load(self, key: Mapping[str, object], devices: int) -> StoredProgram | None:
        """The program of a key, for so many devices; None if there is none that can be used."""
        for folder in (self.folder, self.trusted):
            if folder is None:
                continue
            name = _file_name(key)
            try:
                content = folder.read(name)
                if content is not None:
                    return _parse(content, key, devices)
            except (ValueError, KeyError, TypeError, OSError) as error:
                _log.warning("not using compiled program %s: %s", folder.path / name, error)
        return None

    def save(self, key: Mapping[str, object], program: StoredProgram) -> None:
        """Writes a program into the user's folder. Raises OSError where that fails."""
        header = {
            "key": plain(key),
            "compiled_for": list(program.compiled_for),
            "temporary_bytes": program.temporary_bytes,
            "code_bytes": program.code_bytes,
        }
        rest = json.dumps(header).encode() + b"\n" + program.data
        self.folder.write(_file_name(key), b"%s %s\n%s" % (_FORMAT, _digest(rest), rest))

    def load_note(self, key: Mapping[str, object]) -> dict | None:
        """What was noted under a key; None if nothing was, or it cannot be used."""
        for folder in (self.folder, self.trusted):
            name = _note_name(key)
            try:
                content = None if folder is None else folder.read(name)
                if content is not None:
                    note = json.loads(content)
                    if note["key"] != plain(key):
                        raise ValueError("it was made for something else")
                    return note["note"]
            except (ValueError, KeyError, TypeError, OSError) as error:
                _log.warning("not using %s: %s", name, error)
        return None

    def save_note(self, key: Mapping[str, object], note: Mapping[str, object]) -> None:
        """Notes something, JSON, beside the programs. Raises OSError where that fails."""
        content = {"key": plain(key), "note": dict(note)}
        self.folder.write(_note_name(key), json.dumps(content).encode())


def plain(key: Mapping[str, object]) -> dict:
    """A key as it looks after a round trip through JSON."""
    return json.loads(json.dumps(dict(key), default=str))


def key_digest(key: Mapping[str, object]) -> str:
    """A short digest of a whole key."""
    text = json.dumps(plain(key), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _file_name(key: Mapping[str, object]) -> str:
    return f"{key['name']}-{key_digest(key)}.program"


def _note_name(key: Mapping[str, object]) -> str:
    return f"{key['name']}-{key_digest(key)}.json"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _parse(content: bytes, key: Mapping[str, object], devices: int) -> StoredProgram:
    """Raises ValueError, KeyError or TypeError for a file that is not to be used."""
    first, _, rest = content.partition(b"\n")
    if first != b"%s %s" % (_FORMAT, _digest(rest)):
        raise ValueError("it is damaged, or of another format")
    header_line, data = rest.split(b"\n", 1)
    header = json.loads(header_line)
    if header["key"] != plain(key):
        raise ValueError("it was made for something else")
    compiled_for = tuple(header["compiled_for"])
    if len(set(compiled_for)) != devices or len(compiled_for) != devices:
        raise ValueError(f"it was compiled for devices {compiled_for}, and {devices} are needed")
    return StoredProgram(
        data=data,
        compiled_for=compiled_for,
        temporary_bytes=header["temporary_bytes"],
        code_bytes=header["code_bytes"],
    )
