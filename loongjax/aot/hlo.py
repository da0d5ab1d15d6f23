"""Reads optimized HLO, as compilers print it: instructions in the order in which they run.

Owns the grammar of the text and questions that any program can be asked: what it copies, what it
sends, and what it does while something is on its way. Not here: how long that takes (`overlap`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "f64": 8, "s64": 8}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_NAME = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = ")
_OP = re.compile(r"\s*(?P<op>[\w-]+)\(")
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_LAYER_LOOP = '_scan/while"'  # its end in the name that jax gives the loop
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')

# These give a buffer another name, or write into the one they are given.
_IN_PLACE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "fusion", "custom-call"),
    *("scatter", "dynamic-update-slice"),
}
_COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast", "send", "recv"),
}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: Its name in the program.
      op: What it does.
      arrays: The `(dtype, shape)` of all parts of its result.
      operands: Names of what it works on.
      called: Names of the computations that it runs.
      text: The whole line.
    """

    name: str
    op: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    text: str

    @property
    def elements(self) -> tuple[int, ...]:
        """Elements of each part of the result."""
        return tuple(prod(shape) for _, shape in self.arrays)

    @property
    def result_bytes(self) -> int:
        """Bytes of the result."""
        return sum(_BYTES.get(dtype, 4) * prod(shape) for dtype, shape in self.arrays)

    @property
    def trips(self) -> int | None:
        """How often a loop runs its body, where the compiler says so."""
        found = _TRIPS.search(self.text)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Program:
    """A scheduled program: its computations, each a sequence of instructions.

    Attributes:
      computations: By name.
      entry: The name of the one that runs first.
      layers: Trips of the loop over layers, which not every compiler prints.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    layers: int = 1

    @cached_property
    def runs(self) -> Mapping[str, int]:
        """How often each computation runs. A loop whose trips are run-time values counts as one."""
        found: Counter[str] = Counter({self.entry: 1})
        callers = dict.fromkeys(self.computations, 0)
        for body in self.computations.values():
            for instruction in body:
                for called in instruction.called:
                    callers[called] = callers.get(called, 0) + 1
        ready = [name for name, count in callers.items() if count == 0]
        while ready:
            caller = ready.pop()
            for instruction in self.computations.get(caller, ()):
                for called in instruction.called:
                    found[called] += found[caller] * self._trips(instruction)
                    callers[called] -= 1
                    if callers[called] == 0:
                        ready.append(called)
        return found

    def kernel_calls(self, instruction: Instruction, name: str) -> int:
        """How often an instruction, with what it runs, calls a kernel of this name."""
        if instruction.op == "custom-call":
            return int(name in instruction.text)
        return self._trips(instruction) * sum(
            self.kernel_calls(inner, name)
            for called in instruction.called
            for inner in self.computations.get(called, ())
        )

    def _trips(self, instruction: Instruction) -> int:
        if _LAYER_LOOP in instruction.text and instruction.op == "while":
            return self.layers
        return instruction.trips or 1


@dataclass(frozen=True)
class Hop:
    """A transfer to a neighbour, and what runs while it is on its way.

    Attributes:
      bytes: What each rank sends.
      runs: How often.
      between: What stands between its start and its end; empty too for one that is waited for.
    """

    bytes: int
    runs: int
    between: tuple[Instruction, ...]


def parse(text: str, layers: int = 1) -> Program:
    """Reads a program of so many layers. Raises ValueError for a text without an entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for raw in text.splitlines():
        line = re.sub(r"/\*index=\d+\*/", "", raw)
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif current is not None and (found := _instruction(line)) is not None:
            current.append(found)
    if entry is None:
        raise ValueError("this is no program: it has no ENTRY computation")
    return Program({name: tuple(body) for name, body in computations.items()}, entry, layers)


def hops(program: Program) -> list[Hop]:
    """All transfers to neighbours, in the order of their computations."""
    found = []
    for name, body in program.computations.items():
        runs, begun = program.runs[name], {}
        for at, instruction in enumerate(body):
            if instruction.op == "collective-permute":
                found.append(Hop(instruction.result_bytes, runs, ()))
            elif instruction.op == "collective-permute-start":
                begun[instruction.name] = at
            elif instruction.op == "collective-permute-done":
                between = body[begun[instruction.operands[0]] + 1 : at]
                found.append(Hop(instruction.result_bytes, runs, between))
    return found


def moves_of(elements: int, program: Program) -> list[str]:
    """Instructions that make arrays of so many elements, or more, instead of using old ones."""
    return [
        found.text
        for found in _all(program)
        if found.op not in _IN_PLACE and max(found.elements, default=0) >= elements
    ]


@dataclass(frozen=True)
class Traffic:
    """What a rank receives: instructions and bytes of their results, by kind, over all runs."""

    counts: Counter[str]
    result_bytes: Counter[str]


def traffic(program: Program) -> Traffic:
    """Sums up a program's collectives; an asynchronous one counts when it ends."""
    counts: Counter[str] = Counter()
    result_bytes: Counter[str] = Counter()
    for name, body in program.computations.items():
        for found in body:
            kind = found.op.removesuffix("-done")
            if kind in _COLLECTIVES:
                counts[kind] += program.runs[name]
                result_bytes[kind] += program.runs[name] * found.result_bytes
    return Traffic(counts, result_bytes)


def _all(program: Program) -> Iterator[Instruction]:
    for body in program.computations.values():
        yield from body


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if name is None:
        return None
    end = _end_of_type(line, name.end())
    op = _OP.match(line, end)
    if op is None:
        return None
    arrays = tuple(
        (found["dtype"], tuple(int(n) for n in found["dims"].split(",") if n))
        for found in _ARRAY.finditer(line, name.end(), end)
    )
    called = (found[1] or found[2] for found in _CALLED.finditer(line, op.end()))
    return Instruction(
        name=name["name"],
        op=op["op"],
        arrays=arrays,
        operands=tuple(_OPERAND.findall(line[op.end() : _end_of_type(line, op.end() - 1)])),
        called=tuple(part.strip().lstrip("%") for some in called for part in some.split(",")),
        text=line.strip(),
    )


def _end_of_type(line: str, start: int) -> int:
    """Where the parentheses, or the word, that begin at `start` end; layouts have some, too."""
    depth = 0
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if depth == 0 and (line[at] == " " or (line[start] == "(" and line[at] == ")")):
            return at + (line[at] == ")")
    return len(line)
