"""A program compiled for some devices runs on others, and still in place."""

from __future__ import annotations

import io
import os
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loongjax.programs.rebind import from_bytes, to_bytes

COMPILED_FOR = (0, 1)
SHARD = (4, 3)


def mesh_of(ids: tuple[int, ...]) -> Mesh:
    return Mesh(np.array([jax.devices()[i] for i in ids]), ("sp",))


def body(pool, rows):
    """Adds the neighbour's rows, and this rank's number, to one place of the pool."""
    arrived = jax.lax.ppermute(rows, "sp", [(0, 1), (1, 0)])
    pool = pool.at[jnp.array([1, 2])].set(arrived)
    return pool, pool.sum()[None] + 100 * jax.lax.axis_index("sp")


def program_for(ids: tuple[int, ...]):
    mesh, spec = mesh_of(ids), PartitionSpec("sp")
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec), check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0).lower(*arguments(ids)).compile()


def arguments(ids: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    sharding = NamedSharding(mesh_of(ids), PartitionSpec("sp"))
    put = partial(jax.device_put, device=sharding)
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    return put(jnp.zeros((2 * SHARD[0], SHARD[1]))), put(rows)


@pytest.fixture(scope="module")
def serialized() -> bytes:
    return to_bytes(program_for(COMPILED_FOR))


def rebound(serialized: bytes, ids: tuple[int, ...]):
    trees = [jax.tree.structure(tree) for tree in ((arguments(ids), {}), (0, 0))]
    devices = [jax.devices()[i] for i in ids]
    return from_bytes(
        serialized, compiled_for=COMPILED_FOR, devices=devices, in_tree=trees[0], out_tree=trees[1]
    )


def addresses(array: jax.Array) -> dict[int, int]:
    return {s.device.id: s.data.unsafe_buffer_pointer() for s in array.addressable_shards}


@pytest.mark.parametrize("ids", [(0, 1), (2, 5), (7, 0)])
def test_a_rebound_program_gives_the_same_in_place_on_its_own_devices(serialized, ids):
    program = rebound(serialized, ids)
    for _ in range(2):
        pool, rows = arguments(ids)
        before = addresses(pool)
        after, sums = program(pool, rows)
        assert tuple(device.id for device in after.sharding.mesh.devices) == ids
        assert [shard.device.id for shard in sums.addressable_shards] == list(ids)
        assert addresses(after) == before
        assert pool.is_deleted()
        wanted = np.zeros((2, *SHARD), np.float32)
        wanted[:, 1:3] = np.asarray(rows).reshape(2, 2, 3)[::-1]
        np.testing.assert_array_equal(after, wanted.reshape(after.shape))
        np.testing.assert_array_equal(sums, wanted.sum((1, 2)) + np.array([0, 100]))


def test_groups_of_one_program_run_side_by_side(serialized):
    found = [rebound(serialized, ids)(*arguments(ids)) for ids in ((2, 5), (7, 0), (3, 4))]
    for _, sums in found[1:]:
        np.testing.assert_array_equal(sums, found[0][1])


def test_a_number_of_devices_other_than_compiled_for_is_refused(serialized):
    with pytest.raises(ValueError, match="zip"):
        rebound(serialized, (2, 3, 4, 5))


def test_an_unknown_reference_is_refused(serialized):
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("surprise",) if value == "secret" else None

    file = io.BytesIO()
    Pickler(file).dump("secret")
    with pytest.raises(pickle.UnpicklingError, match="surprise"):
        rebound(file.getvalue(), (0, 1))


class Hostile:
    """Unpickled without care, it leaves a file behind."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "it-ran"
    hostile = pickle.dumps(Hostile(marker))
    with pytest.raises(pickle.UnpicklingError, match="system has no place in a compiled program"):
        rebound(hostile, (0, 1))
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists(), "the pickle would not have run anything"


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "jax._src.core.eval_jaxpr"])
def test_names_that_no_program_needs_are_refused(name):
    module, _, function = name.rpartition(".")
    named = f"c{module}\n{function}\n.".encode()
    with pytest.raises(pickle.UnpicklingError, match="has no place"):
        rebound(named, (0, 1))
