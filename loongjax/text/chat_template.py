"""Chat templates: the Jinja programs by which a model says how a chat is written.

A template comes with a model's files and is foreign code, so it runs in Jinja's immutable
sandbox. What it finds there is what the models' authors wrote it for: `messages`,
`add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`,
`tojson` without HTML escapes, `break` and `continue`, and `generation` blocks.

Refuses: messages without role and content, and whatever the template refuses, as
`RequestError`; a template that does not compile, as `ModelError`, when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loongjax.errors import ModelError, RequestError


class ChatTemplate:
    """One compiled template and the special tokens that it may name.

    Attributes:
      source: Its text.
      variables: The special tokens by name.
    """

    def __init__(self, source: str, *, variables: Mapping[str, str], origin: str) -> None:
        """Compiles a template.

        Args:
          source: Jinja text.
          variables: Special tokens by name (`bos_token`, `eos_token`, ...).
          origin: Where it came from, for messages.

        Raises:
          ModelError: It does not compile.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template of {origin} does not compile: line {error.lineno}: "
                f"{error.message}; mend it, or remove it to use the model without chats"
            ) from error
        self.source = source
        self.variables = dict(variables)

    def render(self, messages: Sequence[object], *, add_generation_prompt: bool) -> str:
        """Writes the chat.

        Raises:
          RequestError: A message lacks something, or the template refuses the chat.
        """
        context = {
            **self.variables,
            "messages": [_checked(index, message) for index, message in enumerate(messages)],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        if not context["messages"]:
            raise RequestError("a chat needs at least one message; messages is empty")
        try:
            return self._template.render(context)
        except Exception as error:  # a template is a program: it can raise anything
            raise RequestError(f"the model's chat template refused the chat: {error}") from error


def _checked(index: int, message: object) -> dict[str, Any]:
    """A message as a plain dict, which is all that a template should get hold of."""
    if not isinstance(message, Mapping):
        raise RequestError(
            f"messages[{index}] must be an object with 'role' and 'content', "
            f"not {type(message).__name__}"
        )
    for key in ("role", "content"):
        if key not in message:
            raise RequestError(
                f"messages[{index}] lacks {key!r}; every message needs role and content"
            )
        if not isinstance(message[key], str):
            raise RequestError(
                f"messages[{index}][{key!r}] must be a string, not {type(message[key]).__name__}"
            )
    return {str(key): value for key, value in message.items()}


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """`{% generation %}`: marks the assistant's words for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
