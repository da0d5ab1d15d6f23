"""The output of a job: a file to which whole lines are appended, and which says what is done.

There is no other book: a line of input is done when a line of output names it. So a process that
is killed at any moment loses what it had in work, and nothing else. At most the last line of the
file is torn then; it is cut off when the file is opened again, and its record answered anew.

Promises: one process writes a file at a time (a lock that the system drops with the process); a
file that holds anything else than answers is refused and left as it is. Every line is handed to
the system whole, and to the disk about once a second.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from loongjax.errors import ConfigError, LoongJaxError
from loongjax.offline.task import Format, Name

_SYNC_S = 1.0
# JSON allows them in texts, but many programs take them for the end of a line.
_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}

_log = logging.getLogger(__name__)


class Output:
    """An open output file.

    Attributes:
      path: Where it is.
      done: The lines of input that have their line of output, with what it says they are called.
      errors: How many of them are errors.
    """

    def __init__(self, path: Path, form: Format, *, overwrite: bool = False) -> None:
        """Opens a file, new or begun; `overwrite` empties it first.

        Raises:
          ConfigError: It cannot be written, another process writes it, or it holds something else.
        """
        self.path = path
        self.done: dict[int, Name] = {}
        self.errors = 0
        self._synced = time.monotonic()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ConfigError(f"the output cannot be written: {error}") from error
        try:
            self._lock()
            if overwrite:
                os.ftruncate(self._file, 0)
            self._resume(form)
        except BaseException:
            os.close(self._file)
            raise

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes a line; its `line` is done from then on.

        Raises:
          LoongJaxError: The system does not take it, such as when the disk is full.
        """
        left = memoryview(_encoded(line))
        try:
            while left:
                left = left[os.write(self._file, left) :]
            if time.monotonic() - self._synced >= _SYNC_S:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise LoongJaxError(
                f"{self.path} cannot be written: {error}; mend it and run the command again, which "
                "goes on where this one stopped"
            ) from error
        self._note(line, None)

    def close(self) -> None:
        """Gives all to the disk, and the file free."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise ConfigError(f"the output {self.path} must be a file, since it is read to resume")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process writes {self.path}; wait for it") from None

    def _resume(self, form: Format) -> None:
        whole = 0
        with open(self._file, "rb", closefd=False) as stream:
            for number, raw in enumerate(stream, start=1):
                if not raw.endswith(b"\n"):
                    _log.info("%s: its last line was cut off by a crash; done again", self.path)
                    break
                self._read(number, raw, form)
                whole += len(raw)
        os.ftruncate(self._file, whole)

    def _read(self, number: int, raw: bytes, form: Format) -> None:
        try:
            written = json.loads(raw)
            line = written.get("line") if isinstance(written, dict) else None
            if type(line) is not int:
                raise ValueError("it has no number of an input line")
            if line in self.done:
                raise ValueError(f"input line {line} is there for the second time")
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.path}, line {number}, is no answer of a job like this one ({error}), so "
                "it is left as it is; choose another output, or give --overwrite to empty it"
            ) from error
        self._note(written, form.name_written(written))

    def _note(self, written: Mapping[str, Any], name: Name) -> None:
        self.done[written["line"]] = name
        self.errors += written.get("error") is not None


def _encoded(line: Mapping[str, Any]) -> bytes:
    text = json.dumps(line, ensure_ascii=False)
    for end, escape in _LINE_ENDS.items():
        text = text.replace(end, escape)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, in an id say, has an ASCII form alone
        return json.dumps(line).encode() + b"\n"
