"""The names of kernel backends, for configurations: imports no jax.

xla              loops of plain jax operations; any platform, tuned for CPU
pallas-tpu       Pallas kernels through Mosaic, for TPU
pallas-triton    Pallas kernels through Triton, for NVIDIA GPUs (Ampere, Hopper)
pallas-hopper    the same, but the ring's attention through Mosaic GPU, for Hopper. UNCONFIRMED: no
                 GPU has run it
interpret        those of pallas-triton, interpreted: for tests on CPU, very slow
interpret-tpu    those of pallas-tpu, interpreted
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Backend: TypeAlias = Literal[
    "xla", "pallas-tpu", "pallas-triton", "pallas-hopper", "interpret", "interpret-tpu"
]
BACKENDS: tuple[str, ...] = get_args(Backend)
