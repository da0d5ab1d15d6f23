"""Devices as instances, and arrays over a group that move nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from loongjax.cluster.mesh import SP, TP, GroupMeshes, assemble, device_grid, take_apart
from loongjax.errors import ConfigError


def shard_on(device: jax.Device, shape=(2, 3)) -> jax.Array:
    """Made by jax: memory that numpy lent could not be donated."""
    return jax.device_put(jnp.full(shape, device.id, jnp.float32), device)


def test_a_grid_takes_the_first_devices_instance_by_instance():
    ids = [[device.id for device in row] for row in device_grid(3, 2)]
    assert ids == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("instances", "tensor_parallel"), [(9, 1), (3, 3), (1, 16)])
def test_too_few_devices_are_refused_with_the_numbers(instances, tensor_parallel):
    needed = instances * tensor_parallel
    message = (
        rf"{instances} instances of {tensor_parallel} devices need {needed} devices, but jax has "
        r"8 \(cpu\)\. Ask for fewer instances, or a smaller tensor_parallel\."
    )
    with pytest.raises(ConfigError, match=message):
        device_grid(instances, tensor_parallel)


def test_a_groups_mesh_has_its_devices_in_rank_order_and_is_made_once():
    meshes = GroupMeshes(device_grid(4, 2))
    mesh = meshes[1, 3]
    assert mesh.axis_names == (SP, TP)
    assert [[device.id for device in row] for row in mesh.devices] == [[2, 3], [6, 7]]
    assert meshes[1, 3] is mesh
    assert meshes[0, 3] is not mesh


@pytest.mark.parametrize(
    ("spec", "shape", "value"),
    [
        # Which device's shard stands at each place of the global array, on devices 2 3 / 6 7.
        (PartitionSpec(SP, TP), (4, 6), [[2, 3], [6, 7]]),
        (PartitionSpec(TP, SP), (4, 6), [[2, 6], [3, 7]]),
        (PartitionSpec(None, (SP)), (2, 6), [[2, 6]]),
        (PartitionSpec(TP), (4, 3), [[2], [3]]),
    ],
)
def test_shards_become_a_global_array_without_moving(spec, shape, value):
    mesh = GroupMeshes(device_grid(4, 2))[1, 3]
    shards = [shard_on(device) for device in mesh.devices.flat]
    array = assemble(mesh, spec, shards)
    assert array.shape == shape
    np.testing.assert_array_equal(array, np.kron(np.array(value), np.ones((2, 3))))
    parts = take_apart(array)
    assert set(parts) == set(mesh.devices.flat)
    for shard in shards:
        (device,) = shard.devices()
        assert parts[device].unsafe_buffer_pointer() == shard.unsafe_buffer_pointer()
        np.testing.assert_array_equal(parts[device], shard)


def test_one_devices_array_serves_several_groups():
    meshes = GroupMeshes(device_grid(3, 1))
    shards = {device: shard_on(device) for device in jax.devices()[:3]}
    for group in [(0, 1), (1, 2), (0, 1, 2)]:
        devices = list(meshes[group].devices.flat)
        array = assemble(meshes[group], PartitionSpec(SP), [shards[d] for d in devices])
        np.testing.assert_array_equal(np.asarray(array)[::2, 0], group)
        for device, part in take_apart(array).items():
            assert part.unsafe_buffer_pointer() == shards[device].unsafe_buffer_pointer()


def test_donating_the_global_array_gives_back_the_same_memory():
    mesh = GroupMeshes(device_grid(2, 1))[0, 1]
    shards = [shard_on(device) for device in mesh.devices.flat]
    before = [shard.unsafe_buffer_pointer() for shard in shards]
    add = jax.jit(lambda x: x + jnp.float32(1), donate_argnums=0)
    array = add(assemble(mesh, PartitionSpec(SP), shards))
    after = take_apart(array)
    assert [after[d].unsafe_buffer_pointer() for d in mesh.devices.flat] == before
    assert all(shard.is_deleted() for shard in shards)
