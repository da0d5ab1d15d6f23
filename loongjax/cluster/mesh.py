"""Groups as meshes: which device belongs to which instance, and arrays over a group.

Weights and KV pool live as one array on each device. A group's global array is put together
from them without moving anything, and taken apart again after a step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loongjax.cluster.ring import ring_order
from loongjax.errors import ConfigError
from loongjax.plan import Group

DeviceGrid: TypeAlias = tuple[tuple[jax.Device, ...], ...]
"""Devices as `[instance][tensor-parallel rank]`."""

SP = "sp"  # mesh axis over the instances of a group
TP = "tp"  # mesh axis over the devices of an instance

_log = logging.getLogger(__name__)


def device_grid(instances: int, tensor_parallel: int) -> DeviceGrid:
    """The first `instances * tensor_parallel` devices, instance by instance, in the order of
    `in_ring_order`.

    Raises ConfigError if there are fewer devices.
    """
    devices = jax.devices()
    needed = instances * tensor_parallel
    if needed > len(devices):
        raise ConfigError(
            f"{instances} instances of {tensor_parallel} devices need {needed} devices, but jax "
            f"has {len(devices)} ({jax.default_backend()}). Ask for fewer instances, or a smaller "
            "tensor_parallel."
        )
    return grid_of(devices, instances, tensor_parallel)


def grid_of(devices: Sequence[jax.Device], instances: int, tensor_parallel: int) -> DeviceGrid:
    """As `device_grid`, of these devices, which must be enough."""
    ordered = in_ring_order(devices)
    return tuple(
        tuple(ordered[i * tensor_parallel : (i + 1) * tensor_parallel]) for i in range(instances)
    )


def in_ring_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """TPU chips so that each is one link from the next (`loongjax.cluster.ring`), where their mesh
    has such an order; other devices as they are.
    """
    if devices[0].platform != "tpu":
        return list(devices)
    order = ring_order([device.coords for device in devices])
    if order is None:
        _log.warning(
            "%d TPU chips have no ring of neighbours: hops take several links", len(devices)
        )
        return list(devices)
    return [devices[at] for at in order]


class GroupMeshes:
    """The meshes of groups, each built once. Axes: `('sp', 'tp')`."""

    def __init__(self, grid: DeviceGrid) -> None:
        self.grid = grid
        self._meshes: dict[Group, Mesh] = {}

    def __getitem__(self, group: Group) -> Mesh:
        mesh = self._meshes.get(group)
        if mesh is None:
            mesh = Mesh(np.array([self.grid[i] for i in group]), (SP, TP))
            self._meshes[group] = mesh
        return mesh


def assemble(mesh: Mesh, spec: PartitionSpec, shards: Sequence[jax.Array]) -> jax.Array:
    """A global array over a mesh from the arrays on its devices; moves nothing.

    `shards` holds one array for each device of the mesh, in the mesh's order; all have the
    shape of one shard. Axes that `spec` does not name are replicated.
    """
    shape = list(shards[0].shape)
    for axis, name in enumerate(spec):
        if name is not None:
            shape[axis] *= mesh.shape[name]
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, list(shards))


def take_apart(array: jax.Array) -> Mapping[jax.Device, jax.Array]:
    """The arrays that a global array consists of, by device; moves nothing."""
    return {shard.device: shard.data for shard in array.addressable_shards}
