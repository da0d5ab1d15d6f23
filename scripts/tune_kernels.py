"""Finds the tiles of striped attention for chips that are not here, and writes their tables.

    python scripts/install_compilers.py            once
    python scripts/tune_kernels.py                 all targets, some minutes
    python scripts/tune_kernels.py h100x8

Where the chip is at hand, `loongjax profile --kernels` measures instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pallas_kernels
from loongjax.aot.compilers import default_folder
from loongjax.aot.targets import TARGETS, target_of
from loongjax.aot.tuning import tune
from loongjax.errors import LoongJaxError

_TABLES = Path(pallas_kernels.__file__).parent / "tuned"


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--folder", type=Path, default=default_folder(), metavar="DIR")
    parser.add_argument("--out", type=Path, default=_TABLES, metavar="DIR", help="of the tables")
    options = parser.parse_args()
    for name in options.targets or [target.name for target in TARGETS]:
        try:
            tuning = tune(target_of(name), options.folder.expanduser())
        except LoongJaxError as error:
            print(f"tune_kernels: {error}", file=sys.stderr)
            return 1
        (options.out / f"{tuning.chip}.json").write_text(tuning.to_json(), encoding="utf-8")
        for row in tuning.striped_attention:
            print(
                f"{name:10} head {row.head_dim:3}, {row.itemsize} bytes: {row.queries} x "
                f"{row.keys}, {1e6 * row.seconds:.0f} us",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
