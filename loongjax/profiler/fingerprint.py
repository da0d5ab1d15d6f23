"""What times were measured on, or would be used on, as a cost model's file says it."""

from __future__ import annotations

from pathlib import Path

import jax

from loongjax.costmodel import Fingerprint
from loongjax.programs.build import ProgramShapes
from loongjax.programs.key import cpu_features_digest


def fingerprint(model: str, shapes: ProgramShapes, max_chunk_tokens: int) -> Fingerprint:
    """Of an engine.

    Args:
      model: As it was asked for; of a folder or a file, the name counts.
      shapes: What its programs have in common.
      max_chunk_tokens: Prompt tokens of a step for each rank.
    """
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"cpu {cpu_features_digest()}"
    return Fingerprint(
        hardware=kind,
        model=Path(model).resolve().name if Path(model).exists() else model,
        tensor_parallel=shapes.tp,
        dtype=str(shapes.dtype),
        software=(
            f"jax {jax.__version__}, {shapes.attention_backend} kernels, blocks of "
            f"{shapes.block_size}, steps of {max_chunk_tokens}"
        ),
    )
