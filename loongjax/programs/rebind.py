"""Compiled programs as bytes, and back on any devices.

The one module that leans on semi-private names of jax. A serialized program remembers the
devices that it was compiled for; the public loader keeps that assignment. Here an unpickler
maps the old devices to new ones, and the executable is loaded with compile options made
for them: milliseconds instead of a compilation. Only for platforms whose compiled code does
not depend on which devices it runs on (CPU and GPU, not TPU).

The unpickler knows the few classes that a serialized program consists of and refuses all
others, so that a pickle cannot call what it likes. But the program itself is machine code:
give this only bytes from a folder that is trusted (`loongjax.programs.folder` checks that).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax._src import compiler
from jax._src.lib import xla_client
from jax.experimental import serialize_executable
from jax.tree_util import PyTreeDef


def to_bytes(program: jax.stages.Compiled) -> bytes:
    """Serializes a compiled program; its trees are not included."""
    return serialize_executable.serialize(program)[0]


# What jax puts into a serialized program. A name that another version of jax adds is refused:
# the program is compiled then, and the log says why.
_KNOWN = {
    "jax": {"P", "NamedSharding"},
    "jax._src.core": {"ManualAxisType", "MemorySpace", "ShapedArray"},
    "jax._src.interpreters.pxla": {"AllArgsInfo", "UnloadedMeshExecutable"},
    "jax._src.layout": {"AutoLayout", "Format", "Layout"},
    "jax._src.linear_util": {"DebugInfo"},
    "jax._src.mesh": {"AbstractDevice", "AbstractMesh", "AxisType", "Mesh"},
    "jax._src.named_sharding": {"NamedSharding", "_unpickle_named_sharding"},
    "jax._src.partition_spec": {"PartitionSpec"},
    "jax._src.stages": {"ArgInfo"},
    "jaxlib._jax": {"DeviceList"},
    "ml_dtypes": {"bfloat16"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct"},
}


class _Rebinder(pickle.Unpickler):
    """Reads a serialized program as if it had been compiled for `devices`."""

    def __init__(self, data: bytes, compiled_for: Sequence[int], devices: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._devices = tuple(devices)
        self._by_old_id = dict(zip(compiled_for, devices, strict=True))

    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a compiled program")
        return super().find_class(module, name)

    def persistent_load(self, pid: tuple) -> Any:
        match pid:
            case ("exec", data):
                # Always with the devices: a payload for two devices, loaded without, aborts
                # the process.
                options = compiler.get_compile_options(
                    num_replicas=1,
                    num_partitions=len(self._devices),
                    device_assignment=np.array([[device.id for device in self._devices]]),
                    backend=self._devices[0].client,
                )
                return self._devices[0].client.deserialize_executable(
                    data, xla_client.DeviceList(self._devices), options
                )
            case ("device", old_id):
                return self._by_old_id[old_id]
            case ("client",):
                return self._devices[0].client
        raise pickle.UnpicklingError(f"unknown reference {pid!r} in a serialized program")


def from_bytes(
    data: bytes,
    *,
    compiled_for: Sequence[int],
    devices: Sequence[jax.Device],
    in_tree: PyTreeDef,
    out_tree: PyTreeDef,
) -> jax.stages.Compiled:
    """Loads a serialized program onto `devices`.

    `compiled_for` are the ids of the devices that it was compiled for, in mesh order;
    `in_tree` is that of `(args, kwargs)`.

    Raises pickle.UnpicklingError for bytes that name anything but the parts of a program, and
    whatever jax raises for a program that it cannot load.
    """
    unloaded, args_info, no_kwargs = _Rebinder(data, compiled_for, devices).load()
    return jax.stages.Compiled(
        unloaded.load(), [], in_tree.unflatten(args_info), out_tree, no_kwargs=no_kwargs
    )
