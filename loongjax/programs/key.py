"""The key of a compiled program: everything that its machine code depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import flax
import jax
import jaxlib

from loongjax.programs.build import ProgramShapes
from loongjax.programs.spec import ProgramSpec

_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_JAX_CONFIG = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_threefry_partitionable",
)
_SOURCE_FOLDERS = ("esp", "models", "programs", "kvcache", "sampling", "cluster")


@runtime_checkable
class KnownDevice(Protocol):
    """What a key says of a device."""

    platform: str
    device_kind: str
    client: Any


def program_key(spec: ProgramSpec, shapes: ProgramShapes, device: KnownDevice) -> dict[str, object]:
    """What a program's compiled form depends on, ready for JSON.

    `device` is one that it runs on; it may be one that only the compiler knows.
    """
    return {
        "name": spec.name,
        "spec": dataclasses.asdict(spec),
        **shapes_key(shapes),
        **platform_key(device),
    }


def shapes_key(shapes: ProgramShapes) -> dict[str, object]:
    """What all programs of an engine have in common."""
    model = dataclasses.asdict(shapes.config)
    del model["bos_id"], model["eos_ids"]  # no program knows them
    return {
        "model": model,
        "shapes": {
            field.name: str(getattr(shapes, field.name))
            for field in dataclasses.fields(shapes)
            if field.name != "config"
        },
    }


def platform_key(device: KnownDevice) -> dict[str, object]:
    """What compiles, and what it compiles for."""
    return {
        "source": source_digest(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "platform": device.platform,
        "platform_version": _compiler_version(device),
        "device_kind": device.device_kind,
        "cpu_features": cpu_features_digest() if device.platform == "cpu" else "",
        "cpu_threads": _cpu_threads() if device.platform == "cpu" else "",
        "flags": {name: os.environ.get(name, "") for name in _FLAGS},
        "jax_config": {name: str(getattr(jax.config, name)) for name in _JAX_CONFIG},
    }


def _cpu_threads() -> str:
    """The size of the client's thread pool, for which XLA cuts loops into tasks."""
    return os.environ.get("NPROC") or str(os.cpu_count())


def _compiler_version(device: KnownDevice) -> str:
    """On GPU that of the plugin: its client names the driver, which a compiler alone has not."""
    if device.platform != "gpu":
        return str(device.client.platform_version)
    found = {each.name: each.version for each in metadata.distributions()}
    plugins = sorted(name for name in found if name.endswith("-pjrt"))
    return " ".join(f"{name}=={found[name]}" for name in plugins)


@cache
def source_digest() -> str:
    """Digest of all source, and the tables of tiles, that programs are traced from."""
    library = Path(__file__).parent.parent
    roots = [library / folder for folder in _SOURCE_FOLDERS]
    roots.append(library.parent / "pallas_kernels")
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
            digest.update(str(path.relative_to(library.parent)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def cpu_features_digest() -> str:
    """Digest of this CPU's instruction sets, without which code may not run, and of how many
    CPUs this process may use, for which the compiler cuts its loops.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{platform.machine()} {features or lines[0]} {cpus}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
