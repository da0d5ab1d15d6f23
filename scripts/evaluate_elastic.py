"""Measures the policy `elastic` in the simulator, on 8 A800: tables and figures.

    python scripts/evaluate_elastic.py --out elastic [--only targets] [--seconds 1000] [--seeds 3]

Every search or run is a cell, and a line of `cells.jsonl`: whoever broke off goes on where it was,
and several processes share the work. Parts: `targets` (sustainable goodput against LoongServe and
chunked prefill), `latency` (time to first token at 0.6 of the fluid bound), `saturated` (what is
served when requests come at the bound for longer), `robust` (wrong cost models, bursts, an instance
lost), `ablation` (one idea left out; like `robust`, searched to a twentieth of the bound), and
`sensitivity` (every constant at half and at twice its value, at 0.8 of the bound). The last two
change constants of modules: what nobody should set has no option.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

if __package__ is None:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))
from loongjax.costmodel import ScalingInformationBase
from loongjax.plan import RequestView
from loongjax.scheduler.policies import create_policy, policy_layout
from loongjax.scheduler.policies.elastic import clock, fused, gathering, lanes, order, prompts
from loongjax.simulator import (
    Goodput,
    Job,
    Objective,
    at_rate,
    attainment,
    deploy,
    draw_jobs,
    find_goodput,
    fluid_rate,
    is_workload,
    read_trace,
    simulate,
    work_rate,
)
from loongjax.simulator.jobs import length_class
from scripts.elastic_report import (
    FACTORS,
    SENSITIVE_PART,
    UNHURRIED,
    USUAL,
    write_report,
)

HARDWARE = "a800x8"
SHAPE = "llama2-7b"
WORKLOADS = ("sharegpt", "leval", "lveval", "mixed", "zipf:1.0", "zipf:1.2", "zipf:1.4")
SLACK = tuple(f"chunked_prefill:order=slack,chunk={size}" for size in (2048, 4096))
LATENCY = ("mixed", "zipf:1.0")
PART = 0.6
SATURATED = ("mixed", "lveval", "zipf:1.0", "zipf:1.2")
LASTING = 4
"""Runs of `saturated` last so many times as long: prompts of hundreds of thousands of tokens that
are begun and not done count for nothing, which tells in shorter ones."""
COARSE = 0.05
LONG = 4000
"""Jobs, from so many on a search begins where one of a part of them ended,"""
PILOT = 8
"""a part that is smaller by this factor."""
COLLECTED_AFTER = (100_000, 20, 20)
"""A run makes many objects that stay: looking through them again and again takes a tenth of it."""
NO_LIMIT = 1e9

Change = tuple[Any, str, Any]
"""A module or class, the name of what is changed in it, and what it becomes."""


def _in_time(self: gathering.Gathering, view: RequestView) -> bool:
    """Whether it keeps its pace though it moves."""
    return self._clock.late_in(view) >= self._cost.migrate(view.computed)


def _one_left(self: lanes.Lanes, needed: Any = lanes.Lanes.decoding) -> int:
    """An instance is left to decodes though nobody needs it yet."""
    return max(1, needed.func(self))


ABLATIONS: dict[str, tuple[str, tuple[Change, ...]]] = {
    "everything": ("elastic", ()),
    "whole prompts": (f"elastic:chunk_s={NO_LIMIT}", ()),
    "order of arrival": ("elastic", ((order, "_EVENNESS", 0.0),)),
    "no riders": ("elastic", ((fused.FusedStep, "_carries", lambda self, works: False),)),
    "no decodes moved": ("elastic", ((gathering.Gathering, "move", lambda *what: None),)),
    "who is late does not move": ("elastic", ((gathering.Gathering, "_has_time", _in_time),)),
    "who decodes across lanes does not go first": (
        "elastic",
        ((prompts.Prompts, "_is_due_across", lambda self, members: False),),
    ),
    "no early reserve": ("elastic", ((clock, "_RESERVE", 0.0),)),
    "all instances for every long prompt": ("elastic", ((lanes, "_CONSTANT_PART", NO_LIMIT),)),
    "one instance for every prompt that fits": ("elastic", ((lanes, "_CONSTANT_PART", 0.0),)),
    "an instance always left to decodes": (
        "elastic",
        ((lanes.Lanes, "decoding", property(_one_left)),),
    ),
    "none alone beside lanes": (
        "elastic",
        ((prompts.Prompts, "_begin_alone", lambda self, view: False),),
    ),
}
CONSTANTS: tuple[tuple[Any, str], ...] = (
    (order, "_HEAD_START_S"),
    (order, "_EVENNESS"),
    (clock, "_RESERVE"),
    (clock, "_RESERVE_TOKENS"),
    (clock, "_LOST"),
    (fused, "_OVERHEAD"),
    (fused, "_LEFTOVER"),
    (lanes, "_CONSTANT_PART"),
    (lanes, "_DECODING_PART"),
    (gathering, "_EARLY"),
    (prompts, "_CATCHING_UP"),
    (prompts, "_STARVING"),
    (prompts, "_ALONE"),
)
SETTINGS = {"decode_s": 0.045, "chunk_s": 0.5, "floor_s": 0.04, "headroom": 512}
SENSITIVE = ("mixed", "zipf:1.0")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run or search: where it stands, and how it is made."""

    part: str
    workload: str
    column: str
    seed: int
    make: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        """Of its file."""
        return name_of(self.part, self.workload, self.column, self.seed)


def name_of(part: str, workload: str, column: str, seed: int) -> str:
    """Of a cell's file, without its ending."""
    text = f"{part}-{Path(workload).name}-{column}-{seed}"
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)


class Evaluation:
    """Makes cells, and keeps them in a folder."""

    def __init__(self, out: Path, seconds: float, seeds: int, trace: Path | None) -> None:
        self.out = out
        self.seconds = seconds
        self.seeds = range(seeds)
        self.trace = trace
        self._made = out / "cells.jsonl"
        (out / "making").mkdir(parents=True, exist_ok=True)

    # ---- cells -----------------------------------------------------------------------

    def made(self) -> dict[str, dict[str, Any]]:
        """What cells of this length say that any process has made, by name."""
        if not self._made.exists():
            return {}
        lines = map(json.loads, self._made.read_text(encoding="utf-8").splitlines())
        return {line.pop("cell"): line for line in lines if line["seconds"] == self.seconds}

    def value(self, cell: Cell) -> dict[str, Any] | None:
        """What a cell says, made now or read; None if another process makes it just now."""
        lock = self.out / "making" / cell.name
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            return self.made().get(cell.name)
        try:
            value = self.made().get(cell.name)
            if value is None:
                value = {**cell.make(), "seconds": self.seconds}
                with self._made.open("a", encoding="utf-8") as file:  # one write: lines stay whole
                    file.write(json.dumps({"cell": cell.name, **value}) + "\n")
        finally:
            with suppress(FileNotFoundError):
                lock.unlink()
        return value

    def cells(self) -> Iterator[Cell]:
        """Everything, in order."""
        workloads = [*WORKLOADS, *([str(self.trace)] if self.trace else ())]
        for seed in self.seeds:
            for workload in workloads:
                for policy in ("elastic", "loongserve", *self._chunks(workload, seed)):
                    yield self._goodput("targets", workload, policy, policy, seed)
            for workload in LATENCY:
                for policy in ("elastic", "loongserve"):
                    yield self._served("latency", workload, policy, seed, PART)
            for workload in SATURATED:
                for policy in ("elastic", UNHURRIED, "loongserve"):
                    yield self._served("saturated", workload, policy, seed, 1.0, LASTING)
        for workload in LATENCY:
            for policy in ("elastic", "loongserve"):
                yield from self._robust(workload, policy)
        for workload in SENSITIVE:
            for name, (policy, changes) in ABLATIONS.items():
                yield self._ablation(workload, name, policy, changes)
        for seed in self.seeds:
            yield from self._sensitivity(seed)

    def _chunks(self, workload: str, seed: int) -> Sequence[str]:
        """Chunked prefill with those lengths of chunks that are tried: for other seeds than the
        first only the one that was best there.
        """
        made = self.made()
        names = [name_of("targets", workload, policy, self.seeds[0]) for policy in SLACK]
        if seed == self.seeds[0] or any(name not in made for name in names):
            return SLACK
        found = [made[name]["sustainable"] for name in names]
        return [SLACK[found.index(max(found))]]

    def _goodput(
        self,
        part: str,
        workload: str,
        column: str,
        policy: str,
        seed: int,
        **conditions: Any,
    ) -> Cell:
        def make() -> dict[str, Any]:
            return self.goodput(workload, policy, seed, **conditions)

        return Cell(part=part, workload=workload, column=column, seed=seed, make=make)

    def _served(
        self,
        part: str,
        workload: str,
        policy: str,
        seed: int,
        load: float,
        lasting: float = 1.0,
    ) -> Cell:
        def make() -> dict[str, Any]:
            return self.served(workload, policy, seed, load, lasting)

        return Cell(part=part, workload=workload, column=policy, seed=seed, make=make)

    def _ablation(self, workload: str, column: str, policy: str, changes: Sequence[Change]) -> Cell:
        """The goodput without an idea, and how long short prompts wait at a rate below it."""

        def make() -> dict[str, Any]:
            with changed(changes):
                found = self.goodput(workload, policy, 0, precision=COARSE)
                return found | self.served(workload, policy, 0, PART)

        return Cell(part="ablation", workload=workload, column=column, seed=0, make=make)

    def _robust(self, workload: str, policy: str) -> Iterator[Cell]:
        conditions: dict[str, dict[str, Any]] = {
            "as it is": {},
            "times 30 % too long": {"factors": (1.3, 1.3)},
            "times 30 % too short": {"factors": (0.7, 0.7)},
            "prompts 30 % too short, decodes too long": {"factors": (0.7, 1.3)},
            "prompts 30 % too long, decodes too short": {"factors": (1.3, 0.7)},
            "answers up to 16,384 told": {"limit": 16_384},
            "bursts (CV 3)": {"cv": 3.0},
            "an instance lost half way": {"lost": True},
        }
        for name, condition in conditions.items():
            column = f"{policy}, {name}"
            condition["precision"] = COARSE
            yield self._goodput("robust", workload, column, policy, 0, **condition)

    def _sensitivity(self, seed: int) -> Iterator[Cell]:
        def cell(workload: str, column: str, policy: str, *changes: Change) -> Cell:
            def make() -> dict[str, Any]:
                with changed(changes):
                    return self.served(workload, policy, seed, SENSITIVE_PART)

            return Cell(part="sensitivity", workload=workload, column=column, seed=seed, make=make)

        for workload in SENSITIVE:
            yield cell(workload, USUAL, "elastic")
            for module, name in CONSTANTS:
                for factor in FACTORS:
                    value = getattr(module, name)
                    value = type(value)(value * factor)
                    column = f"{name.strip('_').lower()} x {factor:g}"
                    yield cell(workload, column, "elastic", (module, name, value))
            for name, usual in SETTINGS.items():
                for factor in FACTORS:
                    policy = f"elastic:{name}={type(usual)(usual * factor)}"
                    yield cell(workload, f"{name} x {factor:g}", policy)

    # ---- what a cell is made of ------------------------------------------------------

    def jobs(
        self,
        workload: str,
        seed: int,
        cv: float = 1.0,
        limit: int | None = None,
        lasting: float = 1.0,
    ) -> list[Job]:
        """As many as keep the fluid bound busy for the seconds asked for, times `lasting`."""
        if not is_workload(workload):
            every = read_trace(workload, limit=limit)
            count = self._count(every, lasting)
            first = seed * count % max(1, len(every) - count)
            return every[first : first + count]
        few = draw_jobs(workload, 2000, rate=1.0, seed=seed)
        count = self._count(few, lasting)
        return draw_jobs(workload, count, rate=1.0, seed=seed, cv=cv, limit=limit)

    def _count(self, jobs: Sequence[Job], lasting: float) -> int:
        bound = fluid_rate(jobs, deploy(HARDWARE, SHAPE))
        return max(60, math.ceil(bound * self.seconds * lasting))

    def goodput(
        self,
        workload: str,
        policy: str,
        seed: int,
        *,
        factors: tuple[float, float] = (1.0, 1.0),
        lost: bool = False,
        precision: float = 0.02,
        **drawn: Any,
    ) -> dict[str, Any]:
        """Rates that a policy sustains [requests/s].

        Args:
          workload: What comes.
          policy: Who plans.
          seed: Of the draws.
          factors: By what its cost model's times of prompts and of decodes are wrong.
          lost: Whether an instance is drained half way.
          precision: Of the search; see `find_goodput`.
          drawn: Of `jobs`.
        """
        deployment = deploy(HARDWARE, SHAPE, layout=policy_layout(policy))
        made = create_policy(policy, wrong(deployment.cost, *factors))
        jobs = self.jobs(workload, seed, **drawn)
        drains = [(self.seconds / 2, 0)] if lost else []

        def search(jobs: Sequence[Job], precision: float, near: Sequence[float]) -> Goodput:
            return find_goodput(
                jobs,
                deployment,
                made,
                Objective(),
                precision=precision,
                near=near,
                drains=drains,
            )

        near = self.known(workload, policy)
        if not near and len(jobs) >= LONG:
            pilot = search(jobs[: len(jobs) // PILOT], COARSE, ())
            near = [pilot.paper / pilot.bound, pilot.every_class / pilot.bound]
        found = search(jobs, precision, near)
        names = ("paper", "every_class", "sustainable", "saturated", "bound")
        return {name: getattr(found, name) for name in names}

    def known(self, workload: str, policy: str) -> list[float]:
        """Where a search may begin: what other seeds came to, as parts of the bound."""
        made = self.made()
        names = [name_of("targets", workload, policy, seed) for seed in self.seeds]
        values = [made[name] for name in names if name in made]
        return [v[name] / v["bound"] for v in values for name in ("paper", "every_class")]

    def served(
        self, workload: str, policy: str, seed: int, part: float, lasting: float = 1.0
    ) -> dict[str, Any]:
        """At a part of the fluid bound: times to first token by class of length [s], who was served
        in time in the worst class, and the work that was done, as a part of what came.
        """
        deployment = deploy(HARDWARE, SHAPE, layout=policy_layout(policy))
        jobs = self.jobs(workload, seed, lasting=lasting)
        rate = part * fluid_rate(jobs, deployment)
        jobs = at_rate(jobs[: math.ceil(part * len(jobs))], rate)
        run = simulate(jobs, deployment, create_policy(policy, deployment.cost))
        times: dict[str, list[float]] = {}
        for outcome in run.outcomes:
            times.setdefault(length_class(outcome.job.prompt), []).append(outcome.ttft)
        found: dict[str, Any] = {
            name: {"p50": float(np.median(t)), "p99": float(np.quantile(t, 0.99)), "mean": mean(t)}
            for name, t in times.items()
        }
        found["attained"] = attainment(run, deployment, Objective()).least
        found["work"] = work_rate(run, deployment, rate) / rate
        return found


def wrong(cost: ScalingInformationBase, prefill: float, decode: float) -> ScalingInformationBase:
    """A cost model whose times are wrong by these factors."""
    return replace(
        cost,
        prefill_fits={d: scaled(fit, prefill) for d, fit in cost.prefill_fits.items()},
        decode_fits={d: scaled(fit, decode) for d, fit in cost.decode_fits.items()},
    )


def scaled(fit: Any, factor: float) -> Any:
    """A fit, all of whose coefficients are times so much."""
    return replace(fit, **{each.name: factor * getattr(fit, each.name) for each in fields(fit)})


@contextmanager
def changed(changes: Sequence[Change]) -> Iterator[None]:
    """With other constants, for as long as it lasts."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes what is missing, then all tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PART",
        help="targets, latency, saturated, robust, ablation, sensitivity; repeatable",
    )
    parser.add_argument("--workload", action="append", metavar="W", help="only these; repeatable")
    parser.add_argument("--seconds", type=float, default=1000.0, help="of a run (default 1000)")
    parser.add_argument("--seeds", type=int, default=3, help="but for robust, ablation (default 3)")
    parser.add_argument("--made", action="store_true", help="make no cell: report those that are")
    parser.add_argument("--trace", type=Path, help="a trace to be served as well")
    options = parser.parse_args(arguments)
    gc.set_threshold(*COLLECTED_AFTER)
    evaluation = Evaluation(options.out, options.seconds, options.seeds, options.trace)
    made = evaluation.made() if options.made else {}
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in evaluation.cells():
        if options.only and cell.part not in options.only:
            continue
        if options.workload and cell.workload not in options.workload:
            continue
        started = time.perf_counter()
        value = made.get(cell.name) if options.made else evaluation.value(cell)
        if value is None:
            continue
        found.setdefault((cell.part, cell.workload, cell.column), []).append(value)
        told = {k: v for k, v in value.items() if isinstance(v, float) and k != "seconds"}
        print(
            f"{cell.name}: "
            + ", ".join(f"{key} {number:.4g}" for key, number in told.items())
            + f", {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    write_report(found, options.out)


if __name__ == "__main__":
    main()
