"""What lies on the devices between steps: weights, KV pools and block tables.

Owns one pool for each device and lends them out as a group's global arrays. A pool is
donated to each step and comes back from it at the same address; nothing is ever copied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from loongjax.cluster.mesh import DeviceGrid, GroupMeshes, assemble, take_apart
from loongjax.kvcache.pool import POOL_SPECS, KVPool, new_pool
from loongjax.models.placement import PlacedLeaf, PlacedWeights
from loongjax.plan import Group, InstanceId
from loongjax.programs.build import ProgramShapes, weight_partition


class DeviceMemory:
    """Weights and pools of all instances."""

    def __init__(self, weights: PlacedWeights, shapes: ProgramShapes, grid: DeviceGrid) -> None:
        """Makes an empty pool on every device of `grid`, `[instance][tp rank]`."""
        self.meshes = GroupMeshes(grid)
        self._grid = grid
        self._shapes = shapes
        self._weights = weights
        self._weight_views: dict[Group, PyTree[Array]] = {}
        self._pools: dict[jax.Device, KVPool] = {}
        for instance in range(len(grid)):
            self.rebuild(instance)

    def rebuild(self, instance: InstanceId) -> None:
        """Replaces an instance's pool by an empty one: at the start, and after a failed
        step, which took the old one with it.
        """
        c, tp = self._shapes.config, self._shapes.tp
        for device in self._grid[instance]:
            self._pools[device] = new_pool(
                device,
                layers=c.layers,
                slots=self._shapes.slots,
                kv_heads=c.kv_heads // tp,
                head_dim=c.head_dim,
                dtype=jnp.dtype(self._shapes.stored_dtype),
                table_entries=self._shapes.table_entries,
            )

    def weights_of(self, group: Group) -> PyTree[Array]:
        """The weights as arrays over a group; put together once and kept."""
        if group not in self._weight_views:
            mesh = self.meshes[group]

            def view(leaf: PlacedLeaf) -> jax.Array:
                shards = [shard for instance in group for shard in leaf.shards[instance]]
                return assemble(mesh, weight_partition(leaf.spec), shards)

            self._weight_views[group] = jax.tree.map(view, self._weights.tree)
        return self._weight_views[group]

    def pool_of(self, group: Group) -> KVPool:
        """The pool as arrays over a group, to be donated to a step."""
        mesh = self.meshes[group]
        pools = [self._pools[device] for device in mesh.devices.flat]
        return KVPool(
            *(
                assemble(mesh, spec, [pool[leaf] for pool in pools])
                for leaf, spec in enumerate(POOL_SPECS)
            )
        )

    def keep_pool(self, pool: KVPool) -> None:
        """Takes back what a step returned for the pool it was given."""
        k, v, table = (take_apart(leaf) for leaf in pool)
        for device in k:
            self._pools[device] = KVPool(k=k[device], v=v[device], table=table[device])

    def replace_table(self, instance: InstanceId, table: object) -> None:
        """Sends an instance's whole block table, int32 [N, 3]."""
        for device in self._grid[instance]:
            self._pools[device] = self._pools[device]._replace(table=jax.device_put(table, device))

    def pool_pointers(self) -> dict[int, tuple[int, int]]:
        """Addresses of K and V by device id; steps must not change them."""
        return {
            device.id: (pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer())
            for device, pool in self._pools.items()
        }

    def release(self) -> None:
        """Drops every reference to device memory."""
        self._pools.clear()
        self._weight_views.clear()
        del self._weights
