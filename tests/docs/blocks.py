"""The code blocks of a Markdown file, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r" *```(\w*)\s*$")
_INDENT = "    "


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A block of code.

    Attributes:
      page: Its file's name.
      line: Where it begins, from 1.
      language: What its fence says; empty for a plain fence and for an indented block.
      text: Its lines.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        return f"{self.page}:{self.line}"

    @property
    def head(self) -> str:
        """Its first line that says something."""
        return next((line.strip() for line in self.text.splitlines() if line.strip()), "")


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """All blocks of a page, in order."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        start = at
        if fence := _FENCE.match(lines[at]):
            at += 1
            while not _FENCE.match(lines[at]):
                at += 1
            body, language = lines[start + 1 : at], fence[1]
        elif lines[at].startswith(_INDENT) and (at == 0 or not lines[at - 1].strip()):
            while at + 1 < len(lines) and lines[at + 1].startswith(_INDENT):
                at += 1
            body, language = [line.removeprefix(_INDENT) for line in lines[start : at + 1]], ""
        else:
            at += 1
            continue
        at += 1
        yield Block(page=page, line=start + 1, language=language, text="\n".join(body))


def all_blocks() -> list[Block]:
    """Those of every page."""
    return [block for page in PAGES for block in blocks_of(page.name, page.read_text("utf-8"))]


_PROGRAMS = ("loongjax", "python", "make", "pip", "curl", "pytest")


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block, in words: all lines of bash, and of a plain block those that begin
    with a program that we know.
    """
    if block.language not in ("", "bash"):
        return []
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        first = line.removeprefix(".venv/bin/").split(" ")[0]
        if first in _PROGRAMS:
            found.append([first, *shlex.split(line, comments=True)[1:]])
        elif block.language == "bash":
            raise ValueError(f"{block.place}: {line!r} begins with no program that is checked")
    return found


def shape_of(block: Block) -> set[str]:
    """The names of an object whose shape a plain block tells; empty for other blocks."""
    if block.language or not block.head.startswith('{"'):
        return set()
    names, depth = set(), 0
    for token in re.findall(r'"[^"]*"|[{}\[\]]', block.text):
        if token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
            if not depth:
                break
        elif depth == 1:
            names.add(token.strip('"'))
    return names
