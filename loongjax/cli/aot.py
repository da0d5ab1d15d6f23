"""`loongjax aot`: compiles a server's programs for hardware that is not here."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongjax.cli.options import add_json_option, degree_list
from loongjax.errors import ConfigError, StepError

if TYPE_CHECKING:
    from loongjax.aot.request import AotRequest

_DESCRIPTION = """\
Compiles every program that a server on the target needs, with the target's own compiler, and
writes a program library that the server there reads (--trust-library). Says what fits, what is
sent, and how much of it is hidden. Needs the compilers: python scripts/install_compilers.py
"""

_EPILOG = """\
examples:
  loongjax aot --target v5p:2x2x2 --model-shape llama2-7b --out library --json
  loongjax aot --target h100x8 --model-shape llama3-8b --tensor-parallel 2 --out library
  loongjax aot --target v5e:2x4 --model-shape llama3-8b --layers 1 --degrees 8 --out look
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `aot` to the command's parser."""
    parser = commands.add_parser(
        "aot",
        help="compile for hardware that is not here",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target",
        required=True,
        metavar="NAME",
        help="v5e:2x4, v6e:2x4, v5p:2x2x2, a100x8 or h100x8",
    )
    parser.add_argument(
        "--model-shape",
        required=True,
        metavar="NAME",
        help="such as llama2-7b, llama3-8b, llama3-70b, qwen3-8b",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the library")
    parser.add_argument(
        "--degrees",
        type=degree_list,
        metavar="D,D,…",
        help="how many instances may work together (default: all that exist on the target)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="chips of each instance (default 1); there are as many instances as chips allow",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="compile only so many, for a quick look"
    )
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per KV block (default 16)"
    )
    parser.add_argument(
        "--max-chunk-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="prompt tokens that an instance computes in one step at most (default 2048)",
    )
    parser.add_argument(
        "--pool-slots",
        type=int,
        metavar="N",
        help="KV slots of each instance (default: what weights and programs leave)",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="positions of a request at most (default: the model's own)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile with little effort, to see memory and traffic alone; keeps no programs",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) // 2),
        metavar="N",
        help="processes that compile at a time (default: half the CPUs, %(default)s)",
    )
    parser.add_argument(
        "--compilers",
        type=Path,
        metavar="DIR",
        help="where scripts/install_compilers.py put them (default: in ~/.cache/loongjax)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Compiles, and prints the table or the JSON object.

    Raises StepError after that if a program did not compile.
    """
    if options.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {options.jobs}")
    from loongjax.aot.compilers import default_folder
    from loongjax.aot.library import compile_library
    from loongjax.api.progress import progress_bar

    with progress_bar("compiling") as show:
        report = compile_library(
            request_of(options),
            options.out.expanduser(),
            (options.compilers or default_folder()).expanduser(),
            jobs=options.jobs,
            on_progress=show,
        )
    print(json.dumps(asdict(report)) if options.json else program_table(report.programs))
    if not options.json:
        tokens = report.kv_tokens
        print(f"KV tokens: {tokens['per_instance']:,} an instance, {tokens['total']:,} in all")
    if report.failed:
        raise StepError("\n".join(report.failed.values()))


def request_of(options: argparse.Namespace) -> AotRequest:
    """What the options ask for."""
    from loongjax.aot.request import AotRequest

    return AotRequest(
        target=options.target,
        model_shape=options.model_shape,
        tensor_parallel=options.tensor_parallel,
        degrees=options.degrees,
        layers=options.layers,
        block_size=options.block_size,
        max_chunk_tokens=options.max_chunk_tokens,
        pool_slots=options.pool_slots,
        max_model_len=options.max_model_len,
        quick=options.quick,
    )


def program_table(programs: Sequence[Mapping[str, Any]]) -> str:
    """The programs, a line each."""
    lines = [f"{'program':44} {'compile':>8} {'temp MB':>8} {'sent MB':>8} {'est. ms':>8} overlap"]
    for each in programs:
        overlap = "" if each["overlap"] is None else f"{each['overlap']:.2f}"
        lines.append(
            f"{each['name']:44} {each['compile_s']:6.1f} s {_mb(each['hbm_bytes']['temporaries'])} "
            f"{_mb(each['collective_bytes'])} {1e3 * each['estimated_s']:8.2f} {overlap}"
        )
    return "\n".join(lines)


def _mb(size: int) -> str:
    return f"{size / 1e6:8.1f}"
