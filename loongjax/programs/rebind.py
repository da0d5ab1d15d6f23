"""Compiled programs as bytes, and back on any devices.

The one module that leans on semi-private names of jax. A serialized program remembers the
devices that it was compiled for; the public loader keeps that assignment. Here an unpickler
maps the old devices to new ones, and the executable is loaded with compile options made
for them: milliseconds instead of a compilation. Only for platforms whose compiled code does
not depend on which devices it runs on (CPU and GPU, not TPU).

Loading runs code that the bytes contain: give it only bytes from a trusted folder
(`loongjax.programs.store` checks that).
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


class _Rebinder(pickle.Unpickler):
    """Reads a serialized program as if it had been compiled for `devices`."""

    def __init__(self, data: bytes, compiled_for: Sequence[int], devices: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._devices = tuple(devices)
        self._by_old_id = dict(zip(compiled_for, devices, strict=True))

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
    """
    unloaded, args_info, no_kwargs = _Rebinder(data, compiled_for, devices).load()
    return jax.stages.Compiled(
        unloaded.load(), [], in_tree.unflatten(args_info), out_tree, no_kwargs=no_kwargs
    )
