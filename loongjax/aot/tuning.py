"""Searches the tiles of striped attention for a chip by estimates; its compiler says what fits.

    python -m loongjax.aot.tuning h100x8      inside that compiler's environment

prints the table. Candidates are taken by their estimate, and the first that the compiler takes
wins. On GPU it must do without spilling registers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import jax

from loongjax.aot.compilers import start
from loongjax.aot.kernel_cases import KernelCase, build, lower
from loongjax.aot.roofline import grid_work
from loongjax.aot.targets import Target, target_of
from loongjax.costmodel.hardware import HardwareDescription, load_hardware
from loongjax.errors import StepError
from pallas_kernels.backend_names import Backend
from pallas_kernels.backends import Kernels, kernels_of
from pallas_kernels.causal_tiles import Tiles, causal_pairs
from pallas_kernels.tuning import TunedTiles, Tuning, tuning_from

_BACKENDS: dict[str, Backend] = {"tpu": "pallas-tpu", "gpu": "pallas-triton"}
# By platform and bytes of a number. On GPU exact float32 products are unrolled in registers: larger
# tiles compile for minutes, and spill.
_SIZES = {
    ("tpu", 2): (256, 512, 1024),
    ("tpu", 4): (256, 512, 1024),
    ("gpu", 2): (32, 64, 128),
    ("gpu", 4): (16, 32, 64),
}
_LAST_WORDS = 10  # lines
_TOKENS = 4096
_NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}

# jax's names, as `device_kind` has them; the ones that share a compute die share a table.
DEVICE_KINDS = {
    "v5e": ("tpu v5 lite", "tpu v5e"),
    "v5p": ("tpu v5", "tpu v5p"),
    "v6e": ("tpu v6 lite", "tpu v6e"),
    "a100": ("nvidia a100", "nvidia a800"),
    "h100": ("nvidia h100", "nvidia h800", "nvidia h200"),
}
SHAPES = (
    KernelCase(kernel="striped_attention", head_dim=64, tokens=_TOKENS),
    KernelCase(kernel="striped_attention", head_dim=128, tokens=_TOKENS),
    KernelCase(kernel="striped_attention", heads=16, head_dim=256, tokens=_TOKENS),
    KernelCase(kernel="striped_attention", head_dim=64, dtype="float32", tokens=_TOKENS),
    KernelCase(kernel="striped_attention", head_dim=128, dtype="float32", tokens=_TOKENS),
)


def kernels_for(platform: str) -> Kernels:
    """The kernels whose tiles a platform's tables hold, without a table."""
    return kernels_of(_BACKENDS[platform])


def estimate_s(case: KernelCase, hardware: HardwareDescription) -> float:
    """What a case with tiles takes at the chip's peaks, and its tiles beside that."""
    kernels = kernels_for(hardware.platform)
    assert case.tiles is not None
    if hardware.platform == "tpu":  # tiles that see nothing are steps of the grid, too
        steps = prod(_grid(case, kernels))
    else:
        steps = case.heads * causal_pairs(case.tokens, Tiles(*case.tiles))
    return grid_work(case, kernels).seconds(hardware) + steps * hardware.tile_s


def candidates(case: KernelCase, platform: str) -> list[KernelCase]:
    """The case with each pair of tiles that is worth a try, the smaller first."""
    sizes = _SIZES[platform, _itemsize(case)]
    return [replace(case, tiles=(queries, keys)) for queries in sizes for keys in sizes]


def row_of(case: KernelCase, seconds: float) -> TunedTiles:
    """A row of the table for a case with tiles, which takes so long."""
    assert case.tiles is not None
    return TunedTiles(
        head_dim=case.head_dim,
        itemsize=_itemsize(case),
        queries=case.tiles[0],
        keys=case.tiles[1],
        seconds=seconds,
    )


def first_that_compiles(
    case: KernelCase, hardware: HardwareDescription, compiles: Callable[[KernelCase], bool]
) -> TunedTiles:
    """The tiles of the least estimate that compile; of equals the smaller, which leave more room.

    Raises StepError, naming the shape, where none does.
    """
    estimates = {each: estimate_s(each, hardware) for each in candidates(case, hardware.platform)}
    for each in sorted(estimates, key=estimates.__getitem__):
        if compiles(each):
            return row_of(each, estimates[each])
    raise StepError(f"no tiles of {case.name} compile for {hardware.title}")


def search(target: Target) -> Tuning:
    """Finds a chip's table; only inside its compiler's environment."""
    hardware, device = load_hardware(target.chip), target.devices()[0]
    kernels = kernels_for(hardware.platform)
    options = _NO_SPILLS if hardware.platform == "gpu" else {}

    def compiles(case: KernelCase) -> bool:
        try:
            lower(case, kernels, device).compile(compiler_options=options)
        except jax.errors.JaxRuntimeError:  # no room for it
            return False
        return True

    rows = [first_that_compiles(shape, hardware, compiles) for shape in SHAPES]
    return Tuning(
        chip=target.chip,
        device_kinds=DEVICE_KINDS[target.chip],
        method="estimated",
        striped_attention=tuple(rows),
    )


def tune(target: Target, folder: Path) -> Tuning:
    """Finds a chip's table in a process of its own, with the compilers in `folder`.

    Raises ConfigError where the compiler is not installed, and StepError, with its last words,
    where it died.
    """
    process = start(
        target.compiler,
        folder,
        ["-m", __name__, target.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = process.communicate()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode != 0 or not lines:
        words = "\n".join(err.strip().splitlines()[-_LAST_WORDS:])
        raise StepError(f"no tiles for {target.name} (exit code {process.returncode}):\n{words}")
    return tuning_from(lines[-1])


def _itemsize(case: KernelCase) -> int:
    return jax.dtypes.canonicalize_dtype(case.dtype).itemsize


def _grid(case: KernelCase, kernels: Kernels) -> tuple[int, ...]:
    run, _, shapes = build(case, kernels)
    jaxpr = jax.make_jaxpr(run)(*shapes)
    (call,) = [eqn for eqn in jaxpr.eqns if "grid_mapping" in eqn.params]
    grid: tuple[int, ...] = call.params["grid_mapping"].grid
    return grid


if __name__ == "__main__":
    print(json.dumps(json.loads(search(target_of(sys.argv[1])).to_json())), flush=True)
