"""Folders of compiled programs: who may write there, and reading and writing whole files.

Loading a compiled program runs code. So a folder is read only if it is this user's own and
nobody else may write to it, and each file is held to the same, on the very descriptor that
is then read; or if the user said that this folder is to be trusted, whoever made it. Whoever
can write to the user's own folder is the user, and nothing here defends against that.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from loongjax.errors import ConfigError


def default_folder() -> Path:
    """The user's own folder for compiled programs."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loongjax" / "programs"


class ProgramFolder:
    """A folder of files that may be read."""

    def __init__(self, path: Path, *, trusted: bool = False) -> None:
        """Makes the user's own folder if need be.

        `trusted`: a folder that was made elsewhere. It is never written to.

        Raises ConfigError where others could write to the user's folder, where it cannot be
        made, or where a trusted one is missing.
        """
        self.path = path
        self._trusted = trusted
        if trusted:
            if not path.is_dir():
                raise ConfigError(f"there is no program library to trust at {path}")
            return
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"cannot make {path} for compiled programs: {error}; choose another program_dir"
            ) from error
        _check_private(path, path.stat())

    def read(self, name: str) -> bytes | None:
        """A file's content, or None if there is none.

        Raises ConfigError for a file, or a folder, that others could have written, and
        OSError where it cannot be read.
        """
        path = self.path / name
        if not self._trusted:
            _check_private(self.path, self.path.stat())
        # A link could lead to a file that is ours and means something else; opening a pipe
        # would wait for its writer.
        flags = os.O_RDONLY | os.O_NONBLOCK | (0 if self._trusted else os.O_NOFOLLOW)
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path} is no plain file")
            if not self._trusted:
                _check_private(path, status)
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file; readers see the old one or the new one, never half of it.

        Raises OSError where that fails; the old file stands then.
        """
        handle, temporary = tempfile.mkstemp(dir=self.path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, self.path / name)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise


def _check_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.getuid():
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, not to {os.getuid()}; loading a compiled "
            "program runs code. Choose another program_dir, or trust the library explicitly"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):o}); loading "
            "a compiled program runs code: make it 0700, or choose another program_dir"
        )
