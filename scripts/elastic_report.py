"""Tables and pictures of what `evaluate_elastic` measured."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

USUAL = "as it is"
UNHURRIED = "elastic:decode_s=0.2"
"""Whose answers need not keep pace with the objective: what that costs under saturation."""
FACTORS = (0.5, 2.0)
SENSITIVE_PART = 0.8
# What is asked of `elastic`: goodput over LoongServe's, and over chunked prefill's in slack order.
TARGETS = {
    "sharegpt": (1.05, 1.1),
    "leval": (1.2, 1.3),
    "lveval": (1.3, 2.0),
    "mixed": (1.3, 2.5),
    "zipf:1.0": (1.2, 1.1),
    "zipf:1.2": (1.4, 1.1),
    "zipf:1.4": (1.3, 1.0),
}
TRACE_TARGET = (1.1, 1.0)

Found: TypeAlias = Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]]
"""What was measured, by part, workload and column; for each seed."""


def write_report(found: Found, out: Path) -> None:
    """Writes `targets.csv`, `latency.csv`, `saturated.csv`, `robust.csv`, `ablation.csv`,
    `sensitivity.csv` and `sensitivity.png` to a folder.
    """
    write_table(out / "targets.csv", target_rows(found))
    write_table(out / "latency.csv", latency_rows(found))
    write_table(out / "saturated.csv", saturated_rows(found))
    write_table(out / "robust.csv", goodput_rows(found, "robust"))
    write_table(out / "ablation.csv", ablation_rows(found))
    write_table(out / "sensitivity.csv", sensitivity_rows(found))
    if any(part == "sensitivity" for part, _, _ in found):
        draw_sensitivity(found, out / "sensitivity.png")


def rate(found: Found, part: str, workload: str, column: str, name: str = "sustainable") -> float:
    """The mean over seeds; not a number if it is missing."""
    values = [each[name] for each in found.get((part, workload, column), ())]
    return mean(values) if values else math.nan


def target_rows(found: Found) -> Iterator[list[str]]:
    """What was reached, beside what is asked."""
    yield [
        *("workload", "elastic", "paper's P90", "of bound", "loongserve", "ratio", "asked"),
        *("chunked, slack", "ratio", "asked", "saturated", "loongserve saturated"),
    ]
    for workload in dict.fromkeys(w for part, w, _ in found if part == "targets"):
        mine, other = (rate(found, "targets", workload, p) for p in ("elastic", "loongserve"))
        slack = chunked_rate(found, workload)
        bound = rate(found, "targets", workload, "elastic", "bound")
        asked = TARGETS.get(workload, TRACE_TARGET)
        full = [
            rate(found, "targets", workload, p, "saturated") / bound
            for p in ("elastic", "loongserve")
        ]
        paper = rate(found, "targets", workload, "elastic", "paper")
        numbers = (mine, paper, mine / bound, other, mine / other, asked[0])
        yield [
            Path(workload).name,
            *(f"{x:.3g}" for x in (*numbers, slack, mine / slack, asked[1], *full)),
        ]


def chunked_rate(found: Found, workload: str) -> float:
    """Of the length of chunks that is best, among those that were tried with the most seeds."""
    cells = [key for key in found if key[:2] == ("targets", workload) and "chunked" in key[2]]
    most = max((len(found[key]) for key in cells), default=0)
    return max((rate(found, *key) for key in cells if len(found[key]) == most), default=math.nan)


def latency_rows(found: Found) -> Iterator[list[str]]:
    """Times to first token, by class."""
    yield ["workload", "policy", "class", "p50 [s]", "p99 [s]", "mean [s]"]
    for (part, workload, policy), runs in found.items():
        for name in ("<4k", "4k-32k", "32k-128k", ">128k") if part == "latency" else ():
            if all(name in each for each in runs):
                times = [mean(each[name][key] for each in runs) for key in ("p50", "p99", "mean")]
                yield [workload, policy, name, *(f"{t:.3g}" for t in times)]


def saturated_rows(found: Found) -> Iterator[list[str]]:
    """The work done, as a part of the fluid bound, when requests come at it for long."""
    policies = ("elastic", UNHURRIED, "loongserve")
    yield ["workload", *policies]
    for workload in dict.fromkeys(w for part, w, _ in found if part == "saturated"):
        work = [rate(found, "saturated", workload, policy, "work") for policy in policies]
        yield [workload, *(f"{part:.3f}" for part in work)]


def goodput_rows(found: Found, part: str) -> Iterator[list[str]]:
    """Goodputs of a part, and what part of the first one's they are."""
    yield ["workload", "what", "sustainable [1/s]", "of the first", "saturated / bound"]
    first: dict[str, float] = {}
    for (of, workload, column), _ in found.items():
        if of != part:
            continue
        value = rate(found, part, workload, column)
        base = first.setdefault(workload, value)
        bound = rate(found, part, workload, column, "bound")
        full = rate(found, part, workload, column, "saturated") / bound
        yield [workload, column, f"{value:.3g}", f"{value / base:.2f}", f"{full:.2f}"]


def ablation_rows(found: Found) -> Iterator[list[str]]:
    """Goodputs without each idea, and times to first token of short prompts at 0.6 of the bound."""
    head, *rows = goodput_rows(found, "ablation")
    yield [*head, "p50 below 4K [s]", "p99 below 4K [s]", "p50 above 128K [s]"]
    for row in rows:
        (value,) = found["ablation", row[0], row[1]]
        short, long = value.get("<4k", {}), value.get(">128k", {})
        times = (short.get("p50"), short.get("p99"), long.get("p50"))
        yield [*row, *("" if t is None else f"{t:.3g}" for t in times)]


def sensitivity_rows(found: Found) -> Iterator[list[str]]:
    """Who was served in time, with each constant changed: the mean over seeds."""
    yield ["workload", "what", "served in time, worst class", "work done"]
    for part, workload, column in found:
        if part == "sensitivity":
            values = [rate(found, part, workload, column, name) for name in ("attained", "work")]
            yield [workload, column, *(f"{value:.3f}" for value in values)]


def write_table(path: Path, rows: Iterator[list[str]]) -> None:
    """As CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def draw_sensitivity(found: Found, path: Path) -> None:
    """Who was served in time at half and at twice each constant."""
    columns = list(dict.fromkeys(c for part, _, c in found if part == "sensitivity"))
    names = list(dict.fromkeys(c.rpartition(" x ")[0] for c in columns if c != USUAL))
    workloads = list(dict.fromkeys(w for part, w, _ in found if part == "sensitivity"))
    picture = Figure(figsize=(10, 0.32 * len(names) + 1.5), layout="constrained")
    all_axes = picture.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for axes, workload in zip(all_axes, workloads, strict=True):
        for factor, colour in zip(FACTORS, ("C0", "C1"), strict=True):
            values = [
                rate(found, "sensitivity", workload, f"{name} x {factor:g}", "attained")
                for name in names
            ]
            axes.plot(values, names, "o", color=colour, label=f"x {factor:g}")
        usual = rate(found, "sensitivity", workload, USUAL, "attained")
        axes.axvline(usual, color="k", linewidth=0.5)
        axes.set_title(workload, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel(f"served in time, worst class, {SENSITIVE_PART} of the bound", fontsize=7)
    picture.axes[0].legend(fontsize=7)
    picture.savefig(path, dpi=120)
