"""Reproduces LoongServe's evaluation (SOSP '24) in the simulator: tables and figures.

    python scripts/reproduce_paper.py --out paper [--only fig10] [--requests 1000]

Every number is a cell, kept in a file of its own: a run that was broken off goes on where it
was. Two columns of baselines: `published` gives each the published chunk sizes, the host time at
which it meets its own published maximum rate of ShareGPT, and the attention at which it meets that
of its longest prompts; `fair` gives all policies the same host time, and searches chunk sizes.
Published numbers stand beside both.

Figures: `curves` (LoongServe's own latency by rate), `fig10` (maximum rate), `fig11` (16 GPUs),
`fig12` (Zipf goodput), `goodput` (the same on the other workloads, fair alone), `fig13` (scale-up),
`fig14` (overheads, by the cost model), and `fig15` (the cost model against measured steps; needs
--calibration FILE). LoongServe stands there twice: as in the paper, strictly in line, and with
patience, since the code that the published numbers come from lets short prompts overtake.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

if __package__ is None:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))
matplotlib.use("Agg")
from matplotlib.figure import Figure

from loongjax.costmodel import ChunkWork, DecodeWork, HostTime, calibrated_sib
from loongjax.scheduler.policies import create_policy, policy_layout
from loongjax.simulator import (
    Deployment,
    Job,
    Objective,
    at_rate,
    deploy,
    draw_jobs,
    find_goodput,
    fluid_rate,
    simulate,
    work_rate,
)
from loongjax.simulator.metrics import normalized_ms
from scripts import fit_a800

MODES = ("published", "fair")
# LoongServe's mean latency by rate (read off the figures, 2-3 %) [ms/token by requests/s].
CURVES = {
    "sharegpt": {8.97: 6.04, 10: 7.69, 16: 13.2, 22: 17.6, 24: 18.7, 26: 22.5, 27: 33.5, 28: 45},
    "leval": {1: 0.293, 1.5: 0.522, 2: 0.899, 2.2: 1.55, 2.3: 2.26, 2.4: 3.07},
    "lveval": {0.03: 0.104, 0.05: 0.269, 0.08: 0.478, 0.1: 0.612, 0.16: 0.955, 0.19: 1.18},
    "mixed": {0.2: 8.36, 0.3: 11.3, 0.4: 14.2, 0.45: 26.7, 0.5: 36.4, 0.55: 67.3},
}
# Limits of the mean latency, whole request by all its tokens [ms/token].
LIMITS = {"sharegpt": 92.0, "leval": 3.5, "lveval": 2.5, "mixed": 70.0}
# As many times more requests: at its rates a thousand of them last half a minute, little more than
# one takes, and a run ends before its backlog hurts anybody.
MORE = {"sharegpt": 2}
OVERTAKING = "loongserve:patience=5"
# Maximum rates [requests/s], printed by LoongServe's notebooks.
MAXIMUM = {
    "loongserve": {"sharegpt": 29.470, "leval": 2.416, "lveval": 0.201, "mixed": 0.553},
    OVERTAKING: {"sharegpt": 29.470, "leval": 2.416, "lveval": 0.201, "mixed": 0.553},
    "tp": {"sharegpt": 6.351, "leval": 1.144, "lveval": 0.090, "mixed": 0.208},
    "disaggregated": {"sharegpt": 10.366, "leval": 0.415},
    "chunked_prefill": {"sharegpt": 23.128, "leval": 1.231, "lveval": 0.082, "mixed": 0.144},
}
CHUNKS = {"sharegpt": 256, "leval": 2048, "lveval": 16_384, "mixed": 2048, "zipf": 512}
FAIR_CHUNKS = (512, 2048, 4096, 16_384)
ZIPF = {
    "loongserve": {"1.0": 1.122, "1.2": 2.925, "1.4": 8.757},
    OVERTAKING: {"1.0": 1.122, "1.2": 2.925, "1.4": 8.757},
    "tp": {"1.0": 0.405, "1.2": 1.355, "1.4": 5.723},
    "static_sp": {"1.0": 0.481, "1.2": 1.478, "1.4": 5.447},
    "replicated": {"1.0": 0.360, "1.2": 1.289, "1.4": 5.000},
}
# Two nodes: as many times LoongServe's maximum rate on Mixed.
TWO_NODES = {"tp:degree=smallest": 1.86, "chunked_prefill:degree=smallest,chunk=2048": 3.37}
# Decode with several masters against one, batch x length (read off the figure).
MASTERS = {
    2: {"1024x10": 0.627, "256x100": 0.834, "64x1000": 1.098, "16x10000": 1.026},
    4: {"1024x10": 0.456, "256x100": 0.674, "64x1000": 1.124, "16x10000": 1.119},
}
# The host time at which LoongServe's published ShareGPT curve is met: its engine's Python takes
# about 0.14 ms for every request in a step.
LOONGSERVE_HOST = HostTime(turn_s=0.3e-3, step_s=0.5e-3, row_s=0.14e-3)
# What a step of vLLM took beside the device: it has 19 to 21 ms from token to token when a request
# comes every second, where the cost model says 7.6.
PYTHON_STEP_S = 12.5e-3
PRECISION = 0.02
CALIBRATION = 0.005
LONGEST_ROW_S = 5e-3
LONGEST_FUSED_S = 50e-3
SLOWEST_ATTENTION = 8.0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What a published engine is calibrated by.

    Attributes:
      host: Its own time.
      fused_s: The constant part of a step that carries decodes along; None: the cost model's.
      attention: How many times as long attention takes in its prefill.
    """

    host: HostTime
    fused_s: float | None = None
    attention: float = 1.0

    def applied(self, deployment: Deployment) -> Deployment:
        """A deployment of this engine. Those that were published launch no step ahead."""
        fits = {
            degree: replace(fit, square_s=fit.square_s * self.attention)
            for degree, fit in deployment.cost.prefill_fits.items()
        }
        if self.fused_s is not None:
            fits = {d: replace(fit, resumed_constant_s=self.fused_s) for d, fit in fits.items()}
        return replace(
            deployment,
            cost=replace(deployment.cost, host=self.host, prefill_fits=fits),
            limits=replace(deployment.limits, steps_ahead=0),
        )


WITHIN_LOONGSERVE = Engine(host=LOONGSERVE_HOST)


def slower(name: str, seconds: float) -> Engine:
    """A baseline with so much calibrated time: of its host for every request in a step; of
    LightLLM, whose steps are quicker than the cost model says, as the constant part of fused ones.
    """
    if name == "chunked_prefill":
        return Engine(host=HostTime(turn_s=0.3e-3, step_s=0.5e-3, row_s=10e-6), fused_s=seconds)
    return Engine(host=HostTime(turn_s=0.3e-3, step_s=PYTHON_STEP_S, row_s=seconds))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number: where it stands, how it is made, and what was published."""

    figure: str
    row: str
    column: str
    published: float | None
    make: Callable[[], float]

    @property
    def name(self) -> str:
        """Of its file."""
        text = f"{self.figure}-{self.row}-{self.column}"
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)


class Paper:
    """Makes cells, and keeps them in a folder."""

    def __init__(self, out: Path, requests: int, seed: int, precision: float = PRECISION) -> None:
        self.out = out
        self.requests = requests
        self.seed = seed
        self.precision = precision
        (out / "cells").mkdir(parents=True, exist_ok=True)

    def value(self, cell: Cell) -> float:
        """The cell's number, made now or read; a file of other settings is made anew."""
        path = self.out / "cells" / f"{cell.name}.json"
        settings: dict[str, float] = {"requests": self.requests, "seed": self.seed}
        if self.precision != PRECISION:
            settings["precision"] = self.precision
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["settings"] == settings:
                return float(content["value"])
        value = cell.make()
        content = {"value": value, "settings": settings}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(path)
        return value

    # ---- the parts of cells ----------------------------------------------------------

    def jobs(self, workload: str, rate: float = 1.0) -> list[Job]:
        """The same requests for everybody."""
        count = self.requests * MORE.get(workload, 1)
        return draw_jobs(workload, count, rate=rate, seed=self.seed)

    def engine(self, policy: str, mode: str) -> Engine | None:
        """None if the comparison is fair, else calibrated."""
        if mode == "fair":
            return None
        name = policy.partition(":")[0]
        if name not in MAXIMUM or name == "loongserve":
            return WITHIN_LOONGSERVE
        attention = self._calibrated(name, "attention", self.calibrate_attention)
        return replace(self._by_host(name), attention=attention)

    def _by_host(self, name: str) -> Engine:
        return slower(name, self._calibrated(name, "host", self.calibrate_host))

    def _calibrated(self, name: str, what: str, make: Callable[[str], float]) -> float:
        return self.value(
            Cell(figure=what, row=name, column="", published=None, make=lambda: make(name))
        )

    def calibrate_host(self, name: str) -> float:
        """The time, as `slower` takes it, at which a baseline meets its published maximum rate of
        ShareGPT [s].
        """
        most = LONGEST_FUSED_S if name == "chunked_prefill" else LONGEST_ROW_S
        return self._highest(name, "sharegpt", lambda seconds: slower(name, seconds), (0.0, most))

    def calibrate_attention(self, name: str) -> float:
        """How many times as long its attention takes if it meets its published maximum rate of the
        longest prompts that it could serve.
        """
        host = self._by_host(name)
        workload = "lveval" if "lveval" in MAXIMUM[name] else "leval"
        return self._highest(
            name, workload, lambda times: replace(host, attention=times), (1.0, SLOWEST_ATTENTION)
        )

    def _highest(
        self, name: str, workload: str, make: Callable[[float], Engine], bounds: tuple[float, float]
    ) -> float:
        """The highest of a baseline's numbers with which it keeps its published rate."""
        policy = self.variants(name, workload, "published")[0]
        rate, jobs = MAXIMUM[name][workload], self.jobs(workload)

        def keeps(number: float) -> bool:
            deployment = self.deployment(policy, make(number))
            in_time = is_in_time(jobs, policy, deployment, LIMITS[workload], rate)
            return in_time and saturated_rate(jobs, policy, deployment) >= rate

        low, high = bounds
        return highest(keeps, low, high, CALIBRATION * (high - low))

    @staticmethod
    def deployment(
        policy: str, engine: Engine | None, hardware: str = "a800x8", **cut: int
    ) -> Deployment:
        """8 A800 unless told otherwise, cut as the policy is at its best."""
        found = deploy(hardware, "llama2-7b", layout=policy_layout(policy), **cut)
        return found if engine is None else engine.applied(found)

    def variants(self, policy: str, workload: str, mode: str) -> list[str]:
        """A policy with the chunk sizes to try."""
        if policy != "chunked_prefill":
            return [policy]
        published = CHUNKS[workload.partition(":")[0]]
        sizes = [published] if mode == "published" else [*FAIR_CHUNKS]
        return [f"{policy}:chunk={size}" for size in sizes]

    def latency(self, workload: str, rate: float) -> float:
        """LoongServe's mean latency at a rate [ms/token]."""
        deployment = self.deployment("loongserve", WITHIN_LOONGSERVE)
        return mean_ms(self.jobs(workload, rate), "loongserve", deployment)

    def maximum(self, policy: str, workload: str, mode: str) -> float:
        """The highest rate whose mean latency is within the limit; the best chunk size's."""
        engine = self.engine(policy, mode)
        return max(
            maximum_rate(self.jobs(workload), name, self.deployment(name, engine), LIMITS[workload])
            for name in self.variants(policy, workload, mode)
        )

    def goodput(self, policy: str, workload: str, mode: str) -> float:
        """P90 goodput, every class at 90 % where the comparison is fair. The paper ran what it
        compared with here within LoongServe.
        """
        within = mode == "published" and policy in ZIPF
        engine, found = WITHIN_LOONGSERVE if within else self.engine(policy, mode), []
        for name in self.variants(policy, workload, mode):
            deployment = self.deployment(name, engine)
            good = find_goodput(
                self.jobs(workload),
                deployment,
                create_policy(name, deployment.cost),
                Objective(),
                precision=self.precision,
            )
            found.append(good.paper if mode == "published" else good.sustainable)
        return max(found)

    # ---- figures ---------------------------------------------------------------------

    def cells(self) -> Iterator[Cell]:
        """Everything, in order."""
        for workload, curve in CURVES.items():
            for rate, known in curve.items():
                yield Cell(
                    figure="curves",
                    row=workload,
                    column=f"{rate:g}/s",
                    published=known,
                    make=lambda w=workload, r=float(rate): self.latency(w, r),
                )
        for mode in MODES:
            for policy, known in MAXIMUM.items():
                for workload in LIMITS:
                    yield Cell(
                        figure="fig10",
                        row=workload,
                        column=f"{policy} {mode}",
                        published=known.get(workload),
                        make=lambda p=policy, w=workload, m=mode: self.maximum(p, w, m),
                    )
        yield from self.two_nodes()
        for mode in MODES:
            for policy in (*ZIPF, "chunked_prefill"):
                for exponent in ("1.0", "1.2", "1.4"):
                    yield Cell(
                        figure="fig12",
                        row=f"zipf:{exponent}",
                        column=f"{policy} {mode}",
                        published=ZIPF.get(policy, {}).get(exponent),
                        make=lambda p=policy, w=f"zipf:{exponent}", m=mode: self.goodput(p, w, m),
                    )
        for policy in ("loongserve", OVERTAKING, "chunked_prefill"):
            for workload in LIMITS:
                yield Cell(
                    figure="goodput",
                    row=workload,
                    column=f"{policy} fair",
                    published=None,
                    make=lambda p=policy, w=workload: self.goodput(p, w, "fair"),
                )
        for policy in ("loongserve", "loongserve:scale_up=false"):
            yield Cell(
                figure="fig13",
                row="sharegpt",
                column=policy,
                published=None,
                make=lambda p=policy: self.goodput(p, "sharegpt", "published"),
            )
        yield from masters()

    def two_nodes(self) -> Iterator[Cell]:
        """16 GPUs: 8 elastic instances, or two engines of TP8."""
        for policy in ("loongserve", *TWO_NODES):
            cut = {} if policy == "loongserve" else {"tensor_parallel": 8}
            yield Cell(
                figure="fig11",
                row="mixed",
                column=policy,
                published=None,
                make=lambda p=policy, c=cut: maximum_rate(
                    self.jobs("mixed"),
                    p,
                    self.deployment(p, self.engine(p, "published"), "a800x16", **c),
                    LIMITS["mixed"],
                ),
            )


def mean_ms(jobs: Sequence[Job], policy: str, deployment: Deployment) -> float:
    """Mean latency of requests by all their tokens [ms]; infinite if any was turned away."""
    run = simulate(jobs, deployment, create_policy(policy, deployment.cost))
    done = [outcome for outcome in run.outcomes if outcome.ending == "completed"]
    mean = normalized_ms(done)["total"]
    return math.inf if mean is None or len(done) < len(jobs) else mean


def is_in_time(
    jobs: Sequence[Job], policy: str, deployment: Deployment, limit: float, rate: float
) -> bool:
    """Whether the mean latency at a rate is within the limit. All runs last as long as all
    requests take at the fluid bound.
    """
    part = rate / fluid_rate(jobs, deployment)
    count = min(len(jobs), max(20, math.ceil(part * len(jobs))))
    return mean_ms(at_rate(jobs[:count], rate), policy, deployment) <= limit


def maximum_rate(jobs: Sequence[Job], policy: str, deployment: Deployment, limit: float) -> float:
    """The highest rate whose mean latency is within the limit, by bisection, and no more than is
    served under saturation.
    """
    bound = fluid_rate(jobs, deployment)
    low, high = 0.0, min(bound, saturated_rate(jobs, policy, deployment))

    def passes(rate: float) -> bool:
        return is_in_time(jobs, policy, deployment, limit, rate)

    return high if passes(high) else highest(passes, low, high, PRECISION * bound)


def highest(passes: Callable[[float], bool], low: float, high: float, precision: float) -> float:
    """The highest number that passes, by bisection between one that does and one that does not."""
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def saturated_rate(jobs: Sequence[Job], policy: str, deployment: Deployment) -> float:
    """What is served when requests come as fast as at the fluid bound [requests/s]: what comes
    faster than that builds a backlog, which hurts nobody before a run ends.
    """
    bound = fluid_rate(jobs, deployment)
    run = simulate(at_rate(jobs, bound), deployment, create_policy(policy, deployment.cost))
    return work_rate(run, deployment, bound)


def masters() -> Iterator[Cell]:
    """What the cost model says of decode steps with several masters, against one."""
    sib = calibrated_sib("a800", "llama2-7b", 2)
    assert sib is not None
    for count, known in MASTERS.items():
        for shape, published in known.items():
            batch, length = (int(part) for part in shape.split("x"))

            def make(rows: int = batch, tokens: int = length, several: int = count) -> float:
                one, many = (
                    sib.decode(4, DecodeWork(rows, rows * tokens, used, tokens))
                    for used in (1, several)
                )
                return many / one

            yield Cell(
                figure="fig14", row=shape, column=f"{count} masters", published=published, make=make
            )


def accuracy(table: Path) -> list[Cell]:
    """The cost model's prefill times against measured ones, row by row [ratio]."""
    found = []
    for number, row in enumerate(fit_a800.read_table(table)):
        degree, tp = row.group
        sib = calibrated_sib("a800", "llama2-7b", tp)
        if sib is None or row.group not in fit_a800.PUBLISHED:
            continue
        chunks: Sequence[ChunkWork] = row.prefill.chunks
        predicted = sib.prefill(degree, chunks)
        found.append(
            Cell(
                figure="fig15",
                row=f"{number} SP{degree}TP{tp} {len(chunks)}x{chunks[0].tokens}",
                column="predicted / measured",
                published=1.0,
                make=lambda p=predicted, m=row.prefill.seconds: p / m,
            )
        )
    return found


def write_figure(out: Path, figure: str, cells: Sequence[tuple[Cell, float]]) -> None:
    """A table as CSV, and bars as PNG: ours beside what was published."""
    with (out / f"{figure}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "column", "value", "published"])
        for cell, value in cells:
            writer.writerow([cell.row, cell.column, f"{value:.4g}", cell.published])
    rows = list(dict.fromkeys(cell.row for cell, _ in cells))
    picture = Figure(figsize=(10, 2.2 * len(rows[:8]) + 1), layout="constrained")
    for axes, row in zip(picture.subplots(len(rows[:8]), squeeze=False)[:, 0], rows, strict=False):
        mine = [(cell, value) for cell, value in cells if cell.row == row]
        axes.bar([cell.column for cell, _ in mine], [value for _, value in mine], color="C0")
        known = [(c.column, c.published) for c, _ in mine if c.published is not None]
        axes.plot([c for c, _ in known], [p for _, p in known], "k_", markersize=24)
        axes.set_title(f"{figure}, {row} (line: as published)", fontsize=9)
        axes.tick_params(axis="x", labelrotation=20, labelsize=7)
    picture.savefig(out / f"{figure}.png", dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes what is missing, then all tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument(
        "--only", action="append", metavar="FIG", help="curves, goodput, fig10 to fig15; repeatable"
    )
    parser.add_argument("--requests", type=int, default=1000, help="of each run (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    parser.add_argument(
        "--precision",
        type=float,
        default=PRECISION,
        help=f"of goodputs, as a part of the fluid bound (default {PRECISION})",
    )
    parser.add_argument("--calibration", type=Path, help="table of measured times, for fig15")
    options = parser.parse_args(arguments)
    paper = Paper(options.out, options.requests, options.seed, options.precision)
    cells = [*paper.cells(), *(accuracy(options.calibration) if options.calibration else ())]
    cells = [cell for cell in cells if not options.only or cell.figure in options.only]
    done: dict[str, list[tuple[Cell, float]]] = {}
    for number, cell in enumerate(cells, 1):
        started = time.perf_counter()
        value = paper.value(cell)
        done.setdefault(cell.figure, []).append((cell, value))
        known = "" if cell.published is None else f" (published {cell.published:g})"
        took = time.perf_counter() - started
        print(
            f"[{number}/{len(cells)}] {cell.figure} {cell.row} {cell.column}: {value:.3g}{known}, "
            f"{took:.0f} s",
            flush=True,
        )
    for figure, found in done.items():
        write_figure(options.out, figure, found)


if __name__ == "__main__":
    main()
