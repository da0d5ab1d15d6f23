"""`loongjax convert`: a model into another layout."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from loongjax.api.progress import progress_bar
from loongjax.checkpoint import convert
from loongjax.checkpoint.pieces import DTYPES
from loongjax.cli.options import add_json_option

_EPILOG = """\
examples:
  loongjax convert ./Llama-3.1-8B ./llama-orbax --dtype bfloat16
  loongjax convert model.gguf ./model-hf --to hf
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `convert` to the command's parser."""
    parser = commands.add_parser(
        "convert",
        help="write a model in another layout",
        description="Writes a model as an Orbax checkpoint, which loads shard by shard, or as "
        "safetensors. Goes on where an earlier run stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", help="demo, random:NAME, a folder, a .gguf file, or an id on the Hugging Face hub"
    )
    parser.add_argument("folder", type=Path, help="where it goes; new or empty")
    parser.add_argument(
        "--to", choices=("orbax", "hf"), default="orbax", help="the layout (default orbax)"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        help="of all tensors (default: each as it is; quantized ones float32)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Converts, and prints what it came to."""
    began = time.monotonic()
    with progress_bar("convert", unit="tensor") as on_progress:
        done = convert(
            options.model,
            options.folder,
            to=options.to,
            dtype=options.dtype,
            on_progress=on_progress,
        )
    seconds = round(time.monotonic() - began, 3)
    if options.json:
        report = dataclasses.asdict(done) | {"folder": str(done.folder), "seconds": seconds}
        print(json.dumps(report), flush=True)
    else:
        print(
            f"{done.folder}: {done.tensors} tensors in {done.pieces} pieces, {done.resumed} of "
            f"them there before, in {seconds} s",
            file=sys.stderr,
        )
