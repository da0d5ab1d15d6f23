"""Compiles every kernel for every target, and prints what the compilers say of it.

python scripts/install_compilers.py            once
python scripts/compile_kernels.py              all targets, some minutes
python scripts/compile_kernels.py h100x8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loongjax.aot.compilers import default_folder
from loongjax.aot.kernel_cases import CASES
from loongjax.aot.kernels import compile_kernels
from loongjax.aot.targets import TARGETS, target_of
from loongjax.errors import LoongJaxError


def main() -> int:
    """Returns the exit code: 1 if a kernel did not compile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--folder", type=Path, default=default_folder(), metavar="DIR")
    options = parser.parse_args()
    failed = 0
    for name in options.targets or [target.name for target in TARGETS]:
        for case in CASES:
            try:
                (found,) = compile_kernels(target_of(name), [case], options.folder.expanduser())
            except LoongJaxError as error:
                print(f"compile_kernels: {error}", file=sys.stderr)
                failed = 1
                continue
            print(
                f"{name:10} {case.name:60} {found.compile_s:5.1f} s, "
                f"{found.temporary_bytes / 1e6:8.1f} MB temporaries, "
                f"{found.pool_copies} copies of the pool",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
