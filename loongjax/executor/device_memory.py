"""What lies on the devices between steps: weights, KV pools and block tables.

Owns one pool for each device and lends them out as a group's global arrays. A pool is
donated to each step and comes back from it at the same address; nothing is ever copied. A
group's arrays stay together until another group needs one of its instances: taking apart and
putting together costs more than all other work around a launch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from loongjax.cluster.mesh import DeviceGrid, GroupMeshes, assemble, take_apart
from loongjax.kvcache.pool import POOL_SPECS, KVPool, new_pool
from loongjax.models.placement import PlacedLeaf, PlacedWeights
from loongjax.plan import Group, InstanceId
from loongjax.programs.build import TABLE_SPEC, ProgramShapes, weight_partition


class DeviceMemory:
    """Weights and pools of all instances."""

    def __init__(self, weights: PlacedWeights, shapes: ProgramShapes, grid: DeviceGrid) -> None:
        """Makes an empty pool on every device of `grid`, `[instance][tp rank]`."""
        self.meshes = GroupMeshes(grid)
        self._grid = grid
        self._shapes = shapes
        self._weights = weights
        self._weight_views: dict[Group, PyTree[Array]] = {}
        # The pool of an instance is either in its devices' pools, or in that of one group.
        self._pools: dict[jax.Device, KVPool] = {}
        self._together: dict[Group, KVPool] = {}
        self._group_of: dict[InstanceId, Group] = {}
        self._blanks: dict[tuple[jax.Device, int], jax.Array] = {}  # by rows
        self._blank_tables: dict[tuple[Group, int], jax.Array] = {}
        self.rebuild(tuple(range(len(grid))))

    def rebuild(self, group: Group) -> None:
        """Replaces the pools of some instances by empty ones: at the start, and after a failed
        step, which took the old ones with it.
        """
        for instance in group:
            together = self._group_of.get(instance)
            if together == group:
                self._forget_group(group)  # perhaps donated and lost: not to be touched
            elif together is not None:
                self._split(together)
        for instance in group:
            for device in self._grid[instance]:
                self._pools[device] = self._new_pool(device)

    def _new_pool(self, device: jax.Device) -> KVPool:
        c, tp = self._shapes.config, self._shapes.tp
        return new_pool(
            device,
            layers=c.layers,
            slots=self._shapes.slots,
            block_size=self._shapes.block_size,
            kv_heads=c.kv_heads // tp,
            head_dim=c.head_dim,
            dtype=jnp.dtype(self._shapes.stored_dtype),
            table_entries=self._shapes.table_entries,
            layout=self._shapes.pool_layout,
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
        together = self._together.get(group)
        if together is not None:
            return together
        for instance in group:
            if instance in self._group_of:
                self._split(self._group_of[instance])
        mesh = self.meshes[group]
        pools = [self._pools[device] for device in mesh.devices.flat]
        whole = KVPool(
            *(
                assemble(mesh, spec, [pool[leaf] for pool in pools])
                for leaf, spec in enumerate(POOL_SPECS)
            )
        )
        self.keep_pool(group, whole)
        return whole

    def keep_pool(self, group: Group, pool: KVPool) -> None:
        """Takes back what a step returned for the pool that it was given."""
        if group not in self._together:
            self._group_of |= dict.fromkeys(group, group)
        self._together[group] = pool

    def replace_table(self, instance: InstanceId, table: object) -> None:
        """Sends an instance's whole block table, int32 [N, 3]."""
        if instance in self._group_of:
            self._split(self._group_of[instance])
        for device in self._grid[instance]:
            self._pools[device] = self._pools[device]._replace(table=jax.device_put(table, device))

    def blank_tables(self, group: Group, rows: int) -> jax.Array:
        """Sampling tables of a group's rows that have nothing in them: for steps that need none.

        Those of a device are the same for all its groups.
        """
        blank = self._blank_tables.get((group, rows))
        if blank is None:
            mesh = self.meshes[group]
            shards = [self._blank_table(device, rows) for device in mesh.devices.flat]
            blank = self._blank_tables[group, rows] = assemble(mesh, TABLE_SPEC, shards)
        return blank

    def _blank_table(self, device: jax.Device, rows: int) -> jax.Array:
        table = self._blanks.get((device, rows))
        if table is None:
            zeros = np.zeros((rows, 2, self._shapes.logits), np.int32)
            table = self._blanks[device, rows] = jax.device_put(zeros, device)
        return table

    def release(self) -> None:
        """Drops every reference to device memory."""
        self._pools.clear()
        self._together.clear()
        self._group_of.clear()
        self._weight_views.clear()
        self._blanks.clear()
        self._blank_tables.clear()
        del self._weights

    def _split(self, group: Group) -> None:
        """Takes a group's arrays apart, so that others can be put together of them."""
        self._pools |= _by_device(self._together[group])
        self._forget_group(group)

    def _forget_group(self, group: Group) -> None:
        del self._together[group]
        for instance in group:
            del self._group_of[instance]


def _by_device(pool: KVPool) -> dict[jax.Device, KVPool]:
    k, v, table = (take_apart(leaf) for leaf in pool)
    return {device: KVPool(k=k[device], v=v[device], table=table[device]) for device in k}
