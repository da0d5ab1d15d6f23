"""Compiles kernels for a target, in a process of their own: compilers may abort.

    python -m loongjax.aot.kernels h100x8 0 3      inside that compiler's environment

prints one line of JSON for each case when it is compiled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loongjax.aot.compilers import start
from loongjax.aot.kernel_cases import CASES, KernelCase, lower, pool_shape
from loongjax.aot.targets import Target, target_of
from loongjax.errors import StepError
from pallas_kernels.backend_names import Backend
from pallas_kernels.backends import Kernels, kernels_of

_LAST_WORDS = 10  # lines


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKernel:
    """What a compiler says of a kernel.

    Attributes:
      case: Its place in `CASES`.
      compile_s: Lowering and compiling.
      temporary_bytes: Device memory beside arguments and results.
      aliased_bytes: Of results that take an argument's place.
      estimated_s: The compiler's estimate; None where it has none, or one below zero.
      pool_copies: Instructions that copy an array of the pool's size.
    """

    case: int
    compile_s: float
    temporary_bytes: int
    aliased_bytes: int
    estimated_s: float | None
    pool_copies: int


def kernels_on(target: Target, case: KernelCase) -> Kernels:
    """The kernels that a case is about on a target, with its chip's tiles."""
    backend: Backend = "pallas-tpu" if target.compiler == "tpu" else "pallas-triton"
    return kernels_of(case.backend or backend, target.chip)


def compile_kernels(
    target: Target, cases: Sequence[KernelCase], folder: Path, *, timeout_s: float = 600.0
) -> list[CompiledKernel]:
    """Compiles `cases`, which are some of `CASES`, for one chip of a target.

    Raises StepError, naming the case and with the compiler's last words, where one fails.
    """
    numbers = [CASES.index(case) for case in cases]
    arguments = ["-m", __name__, target.name, *map(str, numbers)]
    process = start(
        target.compiler, folder, arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += f"\nnot done after {timeout_s:g} s"
    found = [CompiledKernel(**json.loads(line)) for line in out.splitlines() if line[:1] == "{"]
    if len(found) < len(cases):
        words = "\n".join(err.strip().splitlines()[-_LAST_WORDS:])
        raise StepError(
            f"{cases[len(found)].name} does not compile for {target.name} "
            f"(exit code {process.returncode}):\n{words}"
        )
    return found


def _compile(number: int, target: Target) -> CompiledKernel:
    started = time.monotonic()
    case = CASES[number]
    lowered = lower(case, kernels_on(target, case), target.devices()[0])
    compiled = lowered.compile()
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    return CompiledKernel(
        case=number,
        compile_s=seconds,
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        estimated_s=_estimate(cost),
        pool_copies=_pool_copies(compiled.as_text(), CASES[number]),
    )


def _estimate(cost: Mapping[str, float]) -> float | None:
    seconds = cost.get("optimal_seconds")
    return None if seconds is None or seconds < 0.0 else seconds


def _pool_copies(hlo: str, case: KernelCase) -> int:
    if case.kernel == "striped_attention":
        return 0
    shape = f"[{','.join(map(str, pool_shape(case)))}]"
    return sum(shape in line and " copy" in line for line in hlo.splitlines())


def _main(arguments: Sequence[str]) -> None:
    target = target_of(arguments[0])
    for number in arguments[1:]:
        print(json.dumps(asdict(_compile(int(number), target))), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
