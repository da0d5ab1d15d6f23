"""Compiled programs on disk: one file each, named by the digest of its whole key.

A file is one line of JSON (what it is, the digest of the rest, for which devices) and the
serialized program. Loading a program runs code, so a folder or file that others can write, or
that belongs to somebody else, is refused; a file that is damaged or of another key is not
used, and the log says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loongjax.errors import ConfigError

_FORMAT = "loongjax-program-1"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredProgram:
    """A serialized program, and the ids of the devices it was compiled for."""

    data: bytes
    compiled_for: tuple[int, ...]


def default_folder() -> Path:
    """The user's own folder for compiled programs."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loongjax" / "programs"


class ProgramStore:
    """Programs in one folder."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if need be. Raises ConfigError if others could write to it."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_private(folder)
        self._folder = folder

    def load(self, key: Mapping[str, object]) -> StoredProgram | None:
        """The program of a key, or None if there is none that can be used."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            _check_private(path)
            header_line, data = path.read_bytes().split(b"\n", 1)
            header = json.loads(header_line)
            if header["format"] != _FORMAT or header["key"] != _plain(key):
                raise ValueError("it was made for something else")
            if header["sha256"] != hashlib.sha256(data).hexdigest():
                raise ValueError("its content is damaged")
            return StoredProgram(data=data, compiled_for=tuple(header["compiled_for"]))
        except (ValueError, KeyError, TypeError, OSError) as error:
            _log.warning("not using compiled program %s: %s", path, error)
            return None

    def save(self, key: Mapping[str, object], program: StoredProgram) -> None:
        """Writes a program; readers see the old file or the new one, never half of it."""
        header = {
            "format": _FORMAT,
            "key": _plain(key),
            "sha256": hashlib.sha256(program.data).hexdigest(),
            "compiled_for": list(program.compiled_for),
        }
        handle, temporary = tempfile.mkstemp(dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(header).encode() + b"\n" + program.data)
            os.replace(temporary, self._path(key))
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _path(self, key: Mapping[str, object]) -> Path:
        text = json.dumps(_plain(key), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self._folder / f"{key['name']}-{digest}.program"


def _plain(key: Mapping[str, object]) -> dict:
    """A key as it looks after a round trip through JSON."""
    return json.loads(json.dumps(dict(key), default=str))


def _check_private(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to user {status.st_uid}, not to {os.getuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o}); loading "
            "a compiled program runs code: make it 0700, or choose another program_dir"
        )
