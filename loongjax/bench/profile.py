"""Where the time of a cell goes, by kind of operation, from XLA's own trace.

A trace names instructions; what an instruction is for stands in the optimized program, which
XLA dumps as text. Both are of one process that compiles everything itself, started with
`dump_flags`. Times are those of an instruction on the thread that runs it, without what is
nested in it, so a product that uses all cores counts once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

_DUMP = "cpu_after_optimizations.txt"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*?(?<=[\s)}\]])([a-z][\w-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COLLECTIVES = ("all-", "collective-", "reduce-scatter")
_MOVES = ("copy", "scatter", "dynamic-update-slice", "transpose", "concatenate")
GROUPS = ("matmul", "attention", "collective", "copy", "sampling", "other", "host")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One run of an instruction [ns]; `thread` is the line of the trace that shows it."""

    thread: int
    start: float
    end: float
    program: int
    instruction: str


def dump_flags(folder: Path) -> str:
    """What XLA_FLAGS must hold before jax starts, so that programs are dumped to `folder`."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_text"


def read_groups(folder: Path) -> dict[tuple[int, str], str]:
    """The group of every instruction of the dumped programs, by (program, instruction)."""
    found = {}
    for path in folder.glob(f"module_*{_DUMP}"):
        program = int(path.name.split("_")[1].split(".")[0])
        for name, group in instruction_groups(path.read_text()).items():
            found[program, name] = group
    return found


def instruction_groups(hlo: str) -> dict[str, str]:
    """The group of every instruction of an optimized program."""
    found = {}
    for line in hlo.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction:
            op_name = _OP_NAME.search(line)
            found[instruction[1]] = group_of(instruction[2], op_name[1] if op_name else "")
    return found


def group_of(opcode: str, op_name: str) -> str:
    """One of `GROUPS` for an instruction, from its opcode and the scope that it came from."""
    if opcode.startswith(_COLLECTIVES):
        return "collective"
    if "dot_general" in op_name and ("_heads/" in op_name or "/attention/" not in op_name):
        return "matmul"
    if "/attention/" in op_name:
        return "copy" if opcode in _MOVES else "attention"
    if "/cond/" in op_name or "sample" in op_name or "argmax" in op_name:
        return "sampling"
    return "copy" if opcode in _MOVES else "other"


def read_spans(trace: Path) -> list[Span]:
    """Every run of an instruction in a trace that `jax.profiler` wrote to a folder."""
    spans = []
    for path in sorted(trace.rglob("*.xplane.pb")):
        lines = (
            line
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines
        )
        for thread, line in enumerate(lines):
            for event in line.events:
                facts = dict(event.stats)
                if "hlo_op" in facts:
                    spans.append(
                        Span(
                            thread=thread,
                            start=event.start_ns,
                            end=event.start_ns + event.duration_ns,
                            program=int(facts["program_id"]),
                            instruction=str(facts["hlo_op"]),
                        )
                    )
    return spans


def seconds_by_group(
    spans: Iterable[Span], groups: Mapping[tuple[int, str], str], wall_s: float
) -> dict[str, float]:
    """Seconds of each of `GROUPS`; `host` is the wall clock while no instruction runs."""
    spans = list(spans)
    found: defaultdict[str, float] = defaultdict(float)
    for span, own_ns in _own_times(spans):
        found[groups.get((span.program, span.instruction), "other")] += own_ns
    found["host"] = max(0.0, wall_s * 1e9 - _covered_ns(spans))
    return {group: found[group] / 1e9 for group in GROUPS}


def _own_times(spans: Iterable[Span]) -> Iterable[tuple[Span, float]]:
    """Each span with its time less that of the spans nested in it, on the same thread."""
    by_thread = defaultdict(list)
    for span in spans:
        by_thread[span.thread].append(span)
    for found in by_thread.values():
        own = [span.end - span.start for span in found]
        order = sorted(range(len(found)), key=lambda i: (found[i].start, -found[i].end))
        stack: list[int] = []
        for i in order:
            while stack and found[stack[-1]].end <= found[i].start:
                stack.pop()
            if stack:
                own[stack[-1]] -= found[i].end - found[i].start
            stack.append(i)
        yield from zip(found, own, strict=True)


def _covered_ns(spans: Iterable[Span]) -> float:
    """How long at least one instruction runs."""
    covered, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return covered
