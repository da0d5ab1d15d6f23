"""Compiles every kernel for every target, and prints what the compilers say of it, and a roofline.

    python scripts/install_compilers.py            once
    python scripts/compile_kernels.py              all targets, some minutes
    python scripts/compile_kernels.py h100x8

Columns: MFLOP and MB that any implementation needs, the time [us] that they take at the chip's
peaks (bfloat16), the same for what the kernel's grid does, their ratio, the compiler's own estimate
where it has one, seconds of compiling, MB of temporaries, and copies of the pool.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loongjax.aot.compilers import default_folder
from loongjax.aot.kernel_cases import KernelCase, cases_of
from loongjax.aot.kernels import CompiledKernel, compile_kernels, kernels_on
from loongjax.aot.roofline import grid_work, least_work
from loongjax.aot.targets import TARGETS, Target, target_of
from loongjax.costmodel.hardware import load_hardware
from loongjax.errors import LoongJaxError

_HEAD = (
    f"{'target':10} {'kernel':58} {'MFLOP':>9} {'MB':>7} {'least':>7} {'grid':>7} {'ratio':>5} "
    f"{'XLA':>7} {'compile':>7} {'temp':>6} copies"
)


def main() -> int:
    """Returns the exit code: 1 if a kernel did not compile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--folder", type=Path, default=default_folder(), metavar="DIR")
    options = parser.parse_args()
    failed = 0
    print(_HEAD)
    for name in options.targets or [target.name for target in TARGETS]:
        target = target_of(name)
        for case in cases_of(target.chip):
            try:
                (found,) = compile_kernels(target, [case], options.folder.expanduser())
            except LoongJaxError as error:
                print(f"compile_kernels: {error}", file=sys.stderr)
                failed = 1
                continue
            print(_line(target, case, found), flush=True)
    return failed


def _line(target: Target, case: KernelCase, found: CompiledKernel) -> str:
    hardware = load_hardware(target.chip)
    least = least_work(case)
    least_s = least.seconds(hardware)
    grid_s = grid_work(case, kernels_on(target, case)).seconds(hardware)
    estimated = "" if found.estimated_s is None else f"{1e6 * found.estimated_s:.1f}"
    return (
        f"{target.name:10} {case.name:58} {least.flops / 1e6:9.1f} {least.bytes / 1e6:7.2f} "
        f"{1e6 * least_s:7.1f} {1e6 * grid_s:7.1f} {grid_s / least_s:5.2f} {estimated:>7} "
        f"{found.compile_s:7.1f} {found.temporary_bytes / 1e6:6.1f} {found.pool_copies}"
    )


if __name__ == "__main__":
    sys.exit(main())
