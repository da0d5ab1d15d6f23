"""Where the time of one cell of `loongjax bench engine` goes, by kind of operation.

    python scripts/profile_cell.py --cell "decode batch 8" --dtype float32 --json

Compiles the cell's programs anew, since a program must say what its instructions are for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from loongjax.bench.cells import standard_cells
from loongjax.bench.effort import QUICK, Effort
from loongjax.cli.main import show_log

CELLS = {cell.what: cell for cell in standard_cells(Effort().decode_tokens)}


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", required=True, choices=CELLS)
    parser.add_argument("--dtype", default="float32", choices=Effort().dtypes)
    parser.add_argument("--trace", type=Path, metavar="DIR", help="keep the trace (for Perfetto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    show_log()
    with tempfile.TemporaryDirectory() as folder:
        report = profile(options.cell, options.dtype, Path(folder), options.trace)
    if options.json:
        print(json.dumps(report))
    else:
        print(f"{report['what']}, {report['dtype']}: {report['wall_s']:.3f} s")
        for group, seconds in report["seconds"].items():
            print(f"{group:>12} {seconds:9.4f} s {100 * seconds / report['wall_s']:5.1f} %")
    return 0


def profile(what: str, dtype: str, folder: Path, trace: Path | None) -> dict[str, object]:
    """Runs a cell once to compile and once under the profiler."""
    from loongjax.bench.profile import dump_flags

    # Read when jax starts, and part of the key of compiled programs.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump_flags(folder / 'hlo')}"
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    import jax
    import numpy as np

    from loongjax.bench.engine import MODEL, our_settings
    from loongjax.bench.profile import read_groups, read_spans, seconds_by_group
    from loongjax.bench.subjects import ours
    from loongjax.bench.worker import measure
    from loongjax.models.random_weights import random_config

    cell, rng = CELLS[what], np.random.default_rng(0)
    size = (cell.batch, cell.prompt)
    vocab_size = random_config(MODEL).vocab_size
    prompts = [rng.integers(0, vocab_size, size).tolist() for _ in range(2)]
    subject = ours.load(our_settings(dtype, list(CELLS.values())))
    with subject.engine:
        measure(subject, prompts[0], min(cell.tokens, QUICK.decode_tokens))
        subject.warmed()
        tracing = jax.profiler.ProfileOptions()
        tracing.python_tracer_level = 0  # it would slow the engine's thread down
        found = trace or folder / "trace"
        with jax.profiler.trace(str(found), profiler_options=tracing):
            timing = measure(subject, prompts[1], cell.tokens)
    wall_s = timing["first_s"] + timing["window_s"]
    seconds = seconds_by_group(read_spans(found), read_groups(folder / "hlo"), wall_s)
    return {"what": what, "dtype": dtype, "wall_s": wall_s, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
