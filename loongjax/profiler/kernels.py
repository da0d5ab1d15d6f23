"""Times the tiles of striped attention on the chip at hand, and makes a table of the fastest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from loongjax.aot.kernel_cases import KernelCase, build
from loongjax.aot.tuning import SHAPES, candidates, kernels_for, row_of
from loongjax.errors import ConfigError, StepError
from loongjax.profiler.session import OnProgress
from pallas_kernels.backends import Kernels
from pallas_kernels.tuning import TunedTiles, Tuning, chip_of, tunings

_REPEATS = 10


def measure_kernels(on_progress: OnProgress) -> Tuning:
    """Compiles and times all candidates on the first device.

    Raises:
      ConfigError: It is neither TPU nor GPU: elsewhere no kernel has tiles to choose.
      StepError: No tiles of a shape run.
    """
    device = jax.devices()[0]
    if device.platform not in ("tpu", "gpu"):
        raise ConfigError(
            f"kernels are timed on a TPU or a GPU, and this is a {device.platform}; "
            "scripts/tune_kernels.py finds tiles without a chip"
        )
    kernels, kind = kernels_for(device.platform), device.device_kind.lower()
    rows = []
    for done, shape in enumerate(SHAPES):
        on_progress(done, len(SHAPES), shape.name)
        rows.append(
            fastest(candidates(shape, device.platform), lambda case: seconds_of(case, kernels))
        )
    chip = chip_of(kind) or kind.replace(" ", "-")
    return Tuning(
        chip=chip,
        device_kinds=tunings()[chip].device_kinds if chip in tunings() else (kind,),
        method="measured",
        striped_attention=tuple(rows),
    )


def fastest(
    cases: Sequence[KernelCase], seconds: Callable[[KernelCase], float | None]
) -> TunedTiles:
    """The fastest of the cases that run. Raises StepError, naming the shape, where none does."""
    times = {case: found for case in cases if (found := seconds(case)) is not None}
    if not times:
        raise StepError(f"no tiles of {cases[0].name} run here")
    best = min(times, key=times.__getitem__)
    return row_of(best, times[best])


def seconds_of(case: KernelCase, kernels: Kernels) -> float | None:
    """The median time of one call on the first device; None where it does not compile."""
    run, donated, shapes = build(case, kernels)
    carry, *rest = jax.tree.map(lambda shape: jnp.ones(shape.shape, shape.dtype), shapes)
    first, _, used = rest[3:]  # one causal prompt fills the stripe
    rest[3:] = jnp.zeros_like(first), jnp.zeros((), jnp.int32), used * case.tokens
    try:
        program = jax.jit(run, donate_argnums=donated).lower(carry, *rest).compile()
    except jax.errors.JaxRuntimeError:
        return None
    times = []
    for _ in range(_REPEATS + 1):  # the first warms up
        began = time.perf_counter()
        carry = jax.block_until_ready(program(carry, *rest))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
