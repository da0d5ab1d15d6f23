"""Reads optimized HLO, as text: its instructions, their results, and what they are known by."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "f64": 8, "s64": 8}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<result>\([^)]*\)|\S+) (?P<op>[\w-]+)\(")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")

# These give a buffer another name, or write into the one they are given.
_IN_PLACE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "fusion"),
    *("scatter", "dynamic-update-slice"),
}
_COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast", "send", "recv"),
}


@dataclass(frozen=True)
class Instruction:
    """One instruction; `arrays` are the `(dtype, shape)` of all parts of its result."""

    op: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    text: str

    @property
    def elements(self) -> tuple[int, ...]:
        """Elements of each part of the result."""
        return tuple(prod(shape) for _, shape in self.arrays)

    @property
    def result_bytes(self) -> int:
        """Bytes of the result."""
        return sum(_BYTES.get(dtype, 4) * prod(shape) for dtype, shape in self.arrays)


def instructions(text: str) -> Iterator[Instruction]:
    """All instructions of all computations, those inside fusions too."""
    for line in text.splitlines():
        line = re.sub(r"/\*index=\d+\*/", "", line)
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        arrays = tuple(
            (found["dtype"], tuple(int(n) for n in found["dims"].split(",") if n))
            for found in _ARRAY.finditer(match["result"])
        )
        yield Instruction(match["op"], arrays, line.strip())


def moves_of(elements: int, text: str) -> list[str]:
    """Instructions that make arrays of so many elements, or more, instead of using old ones."""
    return [
        found.text
        for found in instructions(text)
        if found.op not in _IN_PLACE and max(found.elements, default=0) >= elements
    ]


@dataclass(frozen=True)
class Traffic:
    """What a program sends: instructions and bytes of their results, by kind."""

    counts: Counter[str]
    result_bytes: Counter[str]


def traffic(text: str) -> Traffic:
    """Sums up a program's collectives; an asynchronous one counts when it starts."""
    counts: Counter[str] = Counter()
    result_bytes: Counter[str] = Counter()
    for found in instructions(text):
        kind = found.op.removesuffix("-start")
        if kind in _COLLECTIVES:
            counts[kind] += 1
            result_bytes[kind] += found.result_bytes
    return Traffic(counts, result_bytes)
