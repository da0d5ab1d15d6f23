"""Sampling fields of a line: from JSON, or the text of a CSV cell, to what `SamplingParams` takes.

Owns the reading of values by the types that the dataclass declares, so that a new field of it is a
new field of every input. Ranges are `SamplingParams`' own business.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from loongjax.errors import RequestError
from loongjax.sampling.params import SamplingParams


class _MismatchError(Exception):
    """A value is not of a type."""


@cache
def sampling_fields() -> Mapping[str, Any]:
    """The names and types of the fields that a line may set."""
    return typing.get_type_hints(SamplingParams)


def with_fields(
    defaults: SamplingParams, values: Mapping[str, Any], *, is_text: bool = False
) -> SamplingParams:
    """`defaults` with some fields set to others.

    Values of None leave the default. `is_text`: values are texts which hold JSON, or just a text.

    Raises:
      RequestError: A field is unknown, or its value of another type or out of range.
    """
    known = sampling_fields()
    set_here = {}
    for name, value in values.items():
        if name not in known:
            raise RequestError(unknown_field(name, known))
        if value is not None:
            set_here[name] = read_value(name, value, known[name], is_text=is_text)
    return replace(defaults, **set_here)


def read_value(name: str, value: Any, hint: Any, *, is_text: bool = False) -> Any:
    """A JSON value, or a text which holds one, as what the type `hint` says.

    Raises:
      RequestError: It is something else; `name` is what it is called.
    """
    try:
        return _from_text(value, hint) if is_text else _read(value, hint)
    except (_MismatchError, OverflowError):
        said = json.dumps(value, default=str)[:100]
        raise RequestError(f"{name} must be {_words(hint)}, not {said}") from None


def unknown_field(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """What is told of a field that does not exist."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
    return f"unknown field {name!r}{hint}"


def parse_json(text: str) -> Any:
    """The value of a JSON text; the text itself if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _from_text(text: str, hint: Any) -> Any:
    """A CSV cell: JSON if it can be read as what is wanted, else the text itself."""
    try:
        return _read(parse_json(text), hint)
    except _MismatchError:
        return _read(text, hint)


def _read(value: Any, hint: Any) -> Any:
    """A JSON value as a type; raises _MismatchError."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_first(value, get_args(hint))
    if origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        of_key, of_value = get_args(hint)
        return {_from_text(key, of_key): _read(each, of_value) for key, each in value.items()}
    elif origin is not None and issubclass(origin, Sequence) and isinstance(value, list):
        return tuple(_read(each, get_args(hint)[0]) for each in value)
    elif hint is bool or hint is str or hint is types.NoneType:
        if isinstance(value, hint):
            return value
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is int and type(value) in (int, float) and value == value // 1:
        return int(value)  # tables write 8 as 8.0
    raise _MismatchError


def _read_first(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _read(value, hint)
        except _MismatchError:
            continue
    raise _MismatchError


def _words(hint: Any) -> str:
    """A type in the words of JSON."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        wanted = [each for each in get_args(hint) if each is not types.NoneType]
        return " or ".join(
            _words(each) for each in wanted if each is not int or float not in wanted
        )
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if origin is not None and issubclass(origin, Mapping):
        return "an object"
    if origin is not None:
        return "a list"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
