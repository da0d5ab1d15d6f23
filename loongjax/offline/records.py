"""The input of a job: JSONL, CSV or Parquet, one record at a time.

Owns where a record lies in its file, which is its name from then on. A record that cannot be read
is handed out with what is wrong, and reading goes on behind it. What the fields mean is not known
here (`loongjax.offline.native`).

Memory: one record; of Parquet, a batch of `_PARQUET_ROWS`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from loongjax.errors import ConfigError

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of an input file.

    Attributes:
      line: Where it begins, from 1: the line of the file; in Parquet, the row.
      fields: Its content; empty if it cannot be read.
      error: Why it cannot be read, or None.
      is_text: Every value is a text, whatever it means (CSV).
      size: About how long it is [characters].
    """

    line: int
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    error: str | None = None
    is_text: bool = False
    size: int = 0


@runtime_checkable
class RecordFile(Protocol):
    """An input file, which may be read more than once."""

    path: Path

    def records(self) -> Iterator[Record]:
        """Every record, in the file's order.

        Raises:
          ConfigError: The file as a whole cannot be read.
        """
        ...


def open_records(path: Path) -> RecordFile:
    """The file at a path, read as its ending says: .jsonl, .csv or .parquet.

    Raises:
      ConfigError: It is no file, has another ending, or Parquet cannot be read here.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"the input cannot be read: {error}") from error
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(
            f"{path}: an input is one of {', '.join(_KINDS)}, by its ending, not {path.suffix!r}"
        )
    return kind(path)


@dataclass(frozen=True, slots=True)
class JsonLines:
    """An object on each line; empty lines are no records."""

    path: Path

    def records(self) -> Iterator[Record]:
        """See `RecordFile.records`."""
        with self.path.open("rb") as stream:
            for line, raw in enumerate(stream, start=1):
                content = raw.removeprefix(_BOM) if line == 1 else raw
                if content.strip():
                    yield _from_json(line, content)


def _from_json(line: int, raw: bytes) -> Record:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(line=line, error=f"the line is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Record(line=line, error=f"the line is not JSON: {error}")
    if not isinstance(fields, dict):
        return Record(
            line=line, error=f'a line is an object such as {{"prompt": …}}, not {_kind(fields)}'
        )
    return Record(line=line, fields=fields, size=len(raw))


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class CsvTable:
    """Comma-separated values under a line of column names. Empty cells are absent fields."""

    path: Path

    def records(self) -> Iterator[Record]:
        """See `RecordFile.records`."""
        csv.field_size_limit(sys.maxsize)  # else a cell of 131,072 characters is refused
        # What is not UTF-8 is told of its own row alone.
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            rows = csv.reader(stream)
            columns = self._columns(rows)
            while True:
                line = rows.line_num + 1
                try:
                    cells = next(rows, None)
                except csv.Error as error:
                    yield Record(line=line, error=f"the row cannot be read: {error}")
                    continue
                if cells is None:
                    return
                if cells:
                    yield _from_row(line, columns, cells)

    def _columns(self, rows: Iterator[list[str]]) -> list[str]:
        try:
            names = next(rows, [])
        except csv.Error as error:
            raise ConfigError(f"{self.path}: the column names cannot be read: {error}") from error
        if not names:
            raise ConfigError(f"{self.path}: the first line must name the columns")
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError(f"{self.path}: column {doubled[0]!r} is there twice; rename one")
        return names


def _from_row(line: int, columns: list[str], cells: list[str]) -> Record:
    if len(cells) != len(columns):
        return Record(
            line=line, error=f"the row has {len(cells)} cells and the file {len(columns)} columns"
        )
    try:
        size = sum(len(cell.encode("utf-8")) for cell in cells)
    except UnicodeEncodeError:
        return Record(line=line, error="the row is not UTF-8")
    present = {name: cell for name, cell in zip(columns, cells, strict=True) if cell}
    return Record(line=line, fields=present, is_text=True, size=size)


@dataclass(frozen=True, slots=True)
class ParquetTable:
    """A Parquet file; nulls are absent fields. Needs pyarrow."""

    path: Path

    def records(self) -> Iterator[Record]:
        """See `RecordFile.records`."""
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise ConfigError(
                f"{self.path}: Parquet is read with pyarrow, which is not installed; "
                "pip install 'loongjax[parquet]', or write the file as JSONL"
            ) from None
        line = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                    for row in batch.to_pylist():
                        line += 1
                        present = {name: cell for name, cell in row.items() if cell is not None}
                        size = sum(len(cell) for cell in row.values() if isinstance(cell, str))
                        yield Record(line=line, fields=present, size=size)
        except (ArrowException, OSError) as error:
            raise ConfigError(f"{self.path} cannot be read behind row {line}: {error}") from error


_KINDS: dict[str, Any] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".csv": CsvTable,
    ".parquet": ParquetTable,
}
