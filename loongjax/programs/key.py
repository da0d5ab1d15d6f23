"""The key of a compiled program: everything that its machine code depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from functools import cache
from pathlib import Path

import jax
import jaxlib

from loongjax.programs.build import ProgramShapes
from loongjax.programs.spec import ProgramSpec

_SOURCE_FOLDERS = ("esp", "models", "programs", "kvcache", "sampling", "cluster")


def program_key(spec: ProgramSpec, shapes: ProgramShapes) -> dict[str, object]:
    """What a program's compiled form depends on, ready for JSON."""
    device = jax.devices()[0]
    return {
        "name": spec.name,
        "spec": dataclasses.asdict(spec),
        "model": dataclasses.asdict(shapes.config),
        "shapes": {
            field.name: str(getattr(shapes, field.name))
            for field in dataclasses.fields(shapes)
            if field.name != "config"
        },
        "source": source_digest(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "device_kind": device.device_kind,
        "cpu_features": cpu_features_digest() if device.platform == "cpu" else "",
        "flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
    }


@cache
def source_digest() -> str:
    """Digest of all source that programs are traced from."""
    library = Path(__file__).parent.parent
    roots = [library / folder for folder in _SOURCE_FOLDERS]
    roots.append(library.parent / "pallas_kernels")
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(library.parent)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def cpu_features_digest() -> str:
    """Digest of the instruction sets of this CPU; code for another may not run."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:16]
