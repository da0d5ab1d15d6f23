"""Prompts made of the columns of a table: `Summarise in {language}: {text}`."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loongjax.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A text with columns' names in braces; a brace itself is written twice, as in `{{`.

    Raises:
      ConfigError: It has no column, or something else in braces.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.columns:
            raise ConfigError(f"the template {self.text!r} names no column, such as {{text}}")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs, each once."""
        return tuple(dict.fromkeys(name for _, name in self._parts() if name is not None))

    def fill(self, fields: Mapping[str, Any]) -> str:
        """The prompt for a record; what is no text in it is written as Python does.

        Raises:
          RequestError: A column is absent or empty.
        """
        absent = [name for name in self.columns if fields.get(name) is None]
        if absent:
            raise RequestError(f"the template needs {absent[0]!r}, which is absent or empty here")
        return "".join(
            literal if name is None else literal + str(fields[name])
            for literal, name in self._parts()
        )

    def _parts(self) -> list[tuple[str, str | None]]:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(
                f"the template {self.text!r} cannot be read: {error}; write a brace itself twice"
            ) from error
        for _, name, form, conversion in parts:
            if name is not None and (not name or form or conversion):
                raise ConfigError(
                    f"the template {self.text!r} has something else than a column's name in "
                    "braces; write a brace itself twice"
                )
        return [(literal, name) for literal, name, _, _ in parts]
