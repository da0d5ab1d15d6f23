"""`loongjax bench engine`: loongjax and its peers in turn, and the price of a degree.

Owns the report. Engines run in processes of their own, one job at a time, and everything that
is measured on the same cores.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from loongjax.api.llm import LLM
from loongjax.bench.cells import (
    Cell,
    decode_cell,
    longest,
    measure_in_turn,
    median_cpu_s,
    median_rates,
    prefill_cell,
    standard_cells,
)
from loongjax.bench.checkpoint import export_random
from loongjax.bench.cores import first_cores
from loongjax.bench.effort import Effort
from loongjax.bench.floor import floor_rate, measure_machine
from loongjax.bench.host import engine_without_device, measure_host_time
from loongjax.bench.peers import PEERS, peers_to_measure, require_peers
from loongjax.bench.process import Worker, own_python
from loongjax.models.random_weights import random_config
from loongjax.sampling.params import SamplingParams

MODEL = "bench58m"
OURS = "loongjax"
_CORES = 2
"""Of all engines and of the floor. Peers get as many threads."""
_INSTANCES = 4
_POOL_SLOTS = 16_384
_MAX_REQUESTS = 32
_HOST_ROWS = 8
_SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
_ITEMSIZES = {"float32": 4, "bfloat16": 2}

_log = logging.getLogger(__name__)


def run_engine_bench(folder: Path, effort: Effort) -> dict[str, Any]:
    """Measures everything; returns the report.

    `folder` holds the peers. Raises ConfigError where they are not installed, BenchError
    where one fails.
    """
    cells = measure_cells(folder, effort)
    return {
        "cells": cells,
        "host_us": measure_host(effort),
        "degree_overhead": measure_degrees(effort),
    }


@first_cores(_CORES)
def measure_cells(folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """Tokens per second of loongjax and of every peer; raises as `run_engine_bench`."""
    require_peers(folder)
    checkpoint = folder / "checkpoints" / MODEL
    export_random(MODEL, checkpoint)
    _warn_if_busy()
    cells = standard_cells(effort.decode_tokens)
    found = []
    for dtype in effort.dtypes:
        found += _cells_of_dtype(folder, checkpoint, cells, dtype, effort.repeats)
    return found


@first_cores(_CORES)
def measure_host(effort: Effort) -> dict[str, Any]:
    """Host time of a decode step of 8 rows [us], by phase, float32: see `loongjax.bench.host`.

    `without_device` is that of an engine whose programs do nothing, so that nothing takes its
    caches away, at 1,024 tokens of context; `context_ratio` that at 65,536 over it.
    """
    steps = effort.host_steps
    with LLM(f"random:{MODEL}", pool_slots=_POOL_SLOTS, max_model_len=2048, dtype="float32") as llm:
        llm.generate([[token] * 128 for token in range(_HOST_ROWS)], _SHORT)  # compiles
        reports = [
            measure_host_time(llm, rows=_HOST_ROWS, context=128, steps=steps)
            for _ in range(effort.repeats)
        ]
    real = sorted(reports, key=lambda report: report.host_us)[len(reports) // 2]
    contexts = (1024, 65_536)
    by_context: dict[int, list[float]] = {context: [] for context in contexts}
    with contextlib.ExitStack() as stack:
        engines = {
            context: stack.enter_context(
                engine_without_device(rows=_HOST_ROWS, context=context, steps=steps)
            )
            for context in contexts
        }
        for _ in range(effort.repeats):  # in turn: what disturbs one disturbs the other
            for context, llm in engines.items():
                report = measure_host_time(llm, rows=_HOST_ROWS, context=context, steps=steps)
                by_context[context].append(report.host_us)
    without_device = {context: median(found) for context, found in by_context.items()}
    return {
        "rows": real.rows,
        "total": real.host_us,
        "phases": real.phases,
        "call": real.call_us,
        "bare_call": real.bare_call_us,
        "without_device": without_device[1024],
        "context_ratio": without_device[65_536] / without_device[1024],
    }


@first_cores(_CORES)
def measure_degrees(effort: Effort) -> dict[str, dict[str, float]]:
    """CPU time of the same work at a higher degree over that at degree 1, float32.

    Always on 4 emulated instances, of which a group of 1, 2 or 4 works. CPU time is user and
    system time of the whole process; wall clock says nothing where instances share cores.
    """
    prefill, decode = prefill_cell(8192), decode_cell(8, effort.decode_tokens)
    plan: dict[str, tuple[Cell, tuple[int, ...]]] = {
        "prefill_8192": (prefill, (1, 2, 4)),
        "decode_batch_8": (decode, (1, 2)),
    }
    overhead = {}
    for name, (cell, degrees) in plan.items():
        with contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(_our_worker(str(degree), "float32", [cell], degree))
                for degree in degrees
            ]
            timings = measure_in_turn(
                workers, [cell], vocab_size=_vocab_size(), repeats=effort.cpu_repeats
            )
        cpu_s = median_cpu_s(timings, cell)
        overhead[name] = {
            str(degree): cpu_s[str(degree)] / cpu_s["1"] for degree in degrees if degree > 1
        }
    return overhead


def _cells_of_dtype(
    folder: Path, checkpoint: Path, cells: Sequence[Cell], dtype: str, repeats: int
) -> list[dict[str, Any]]:
    settings = {
        "model": str(checkpoint),
        "dtype": dtype,
        "threads": _CORES,
        "max_len": longest(cells),
        "max_requests": _MAX_REQUESTS,
    }
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_our_worker(OURS, dtype, cells))]
        for peer in peers_to_measure(folder, dtype):
            worker = Worker(
                peer.name, python=peer.python(folder), subject=peer.subject, settings=settings
            )
            workers.append(stack.enter_context(worker))
        timings = measure_in_turn(workers, cells, vocab_size=_vocab_size(), repeats=repeats)
    machine = measure_machine(dtype)
    _log.info(
        "%s: the machine reads %.1f GB/s and computes %.1f GFLOP/s",
        *(dtype, machine.bytes_per_s / 1e9, machine.flops_per_s / 1e9),
    )
    model = random_config(MODEL)
    return [
        describe_cell(
            cell,
            dtype,
            median_rates(timings, cell),
            floor_rate(cell, model, _ITEMSIZES[dtype], machine),
        )
        for cell in cells
    ]


def describe_cell(
    cell: Cell, dtype: str, rates: dict[str, float], floor_tokens_per_s: float
) -> dict[str, Any]:
    """One object of the report's `cells`; `rates` are tokens/s by worker, ours among them."""
    peers = {name: rate for name, rate in rates.items() if name != OURS}
    best = max(peers[peer.name] for peer in PEERS if peer.required)
    return {
        "what": cell.what,
        "dtype": dtype,
        "ours": rates[OURS],
        "peers": peers,
        "ratio_to_best": rates[OURS] / best,
        "floor_ratio": rates[OURS] / floor_tokens_per_s,
    }


def our_settings(dtype: str, cells: Sequence[Cell], degree: int | None = None) -> dict[str, Any]:
    """What loongjax's subject is loaded with: one instance, or one degree of several."""
    return {
        "model": f"random:{MODEL}",
        "dtype": dtype,
        "max_len": longest(cells),
        "instances": 1 if degree is None else _INSTANCES,
        "degree": degree,
        "pool_slots": _POOL_SLOTS,
    }


def _our_worker(name: str, dtype: str, cells: Sequence[Cell], degree: int | None = None) -> Worker:
    settings = our_settings(dtype, cells, degree)
    return Worker(name, python=own_python(), subject="ours", settings=settings)


def _vocab_size() -> int:
    return random_config(MODEL).vocab_size


def _warn_if_busy() -> None:
    load = os.getloadavg()[0]
    if load > 0.5:
        _log.warning(
            "other programs use this machine (load %.1f of %s cores): every figure will be too "
            "low, and those of peers with spinning threads most of all",
            *(load, os.cpu_count()),
        )
