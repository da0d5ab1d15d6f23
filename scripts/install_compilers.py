"""Installs the compilers of TPU and GPU, so that programs can be compiled without the hardware.

    python scripts/install_compilers.py            both, about 600 MB, once
    python scripts/install_compilers.py tpu

Each is a virtual environment of its own; loongjax itself stays as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from loongjax.aot.compilers import default_folder, install
from loongjax.aot.targets import Compiler
from loongjax.cli.main import show_log
from loongjax.errors import LoongJaxError


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = get_args(Compiler)
    parser.add_argument("compilers", nargs="*", metavar="NAME", help=f"{' or '.join(known)}")
    parser.add_argument("--folder", type=Path, default=default_folder(), metavar="DIR")
    options = parser.parse_args()
    unknown = set(options.compilers) - set(known)
    if unknown:
        parser.error(f"no compiler is named {', '.join(sorted(unknown))}")
    show_log()
    try:
        for compiler in options.compilers or known:
            install(compiler, options.folder.expanduser())
    except LoongJaxError as error:
        print(f"install_compilers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
