"""Weights on eight emulated devices: where they land, how often they are read, sharing."""

from __future__ import annotations

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.errors import ConfigError
from loongjax.models.placement import place_weights, stacks_layers
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.models.weights import read_into, shard_index

CONFIG = dataclasses.replace(random_config("tiny"), vocab_size=509, qkv_bias=True)
DEVICES = np.array(jax.devices()).reshape(4, 2).tolist()  # instances x tp


class CountingSource:
    """Random weights; remembers what was asked for."""

    def __init__(self):
        self.inner = RandomSource(config=CONFIG)
        self.reads = collections.Counter()

    def read(self, spec, index):
        self.reads[spec.path, tuple((part.start, part.stop) for part in index)] += 1
        return self.inner.read(spec, index)


def expected_shard(leaf, rank, tp, dtype):
    """What device `rank` should hold, read straight from the source."""
    shard = np.empty(leaf.shard_shape(tp), dtype)
    for layer, spec in enumerate(leaf.tensors):
        part = shard[layer] if leaf.stacked else shard
        read_into(part, RandomSource(config=CONFIG), spec, shard_index(spec, rank, tp))
    return shard


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_instance_holds_a_replica_cut_over_its_devices(stacked, dtype):
    placed = place_weights(CONFIG, RandomSource(config=CONFIG), DEVICES, dtype, stacked=stacked)
    assert (placed.stacked, placed.dtype) == (stacked, np.dtype(dtype))
    assert isinstance(placed.tree["layers"], dict if stacked else tuple)
    leaves = jax.tree.leaves(placed.tree)
    assert len(leaves) == 3 + 12 * (1 if stacked else 2)
    for leaf in leaves:
        for rank in range(2):
            expected = expected_shard(leaf.spec, rank, 2, np.dtype(dtype))
            for instance in range(4):
                array = leaf.shards[instance][rank]
                assert array.devices() == {DEVICES[instance][rank]}
                assert array.dtype == dtype
                np.testing.assert_array_equal(np.asarray(array), expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_everything_is_read_once_and_whole_tensors_of_all_ranks_too(stacked):
    source = CountingSource()
    place_weights(CONFIG, source, DEVICES, jnp.float32, stacked=stacked)
    assert set(source.reads.values()) == {1}
    paths = collections.Counter(path for path, _ in source.reads)
    assert paths["layers.1.down"] == 2  # a half for each rank
    assert paths["layers.1.attn_norm"] == 1  # for both ranks of all instances


def test_devices_of_one_process_share_one_copy_on_cpu():
    placed = place_weights(
        CONFIG, RandomSource(config=CONFIG), DEVICES, jnp.bfloat16, stacked=False
    )
    for leaf in jax.tree.leaves(placed.tree):
        for rank in range(2):
            places = {row[rank].unsafe_buffer_pointer() for row in leaf.shards}
            assert len(places) == 1
    norm = placed.tree["final_norm"].shards
    assert norm[0][0].unsafe_buffer_pointer() == norm[3][1].unsafe_buffer_pointer()


def test_a_program_that_is_given_a_shared_array_leaves_the_others_alone():
    devices = [[device] for device in jax.devices()[:2]]
    placed = place_weights(CONFIG, RandomSource(config=CONFIG), devices, jnp.float32, stacked=False)
    leaf = placed.tree["embed"]
    before = np.array(leaf.shards[1][0])
    jax.jit(lambda x: x + 1, donate_argnums=0)(leaf.shards[0][0]).block_until_ready()
    np.testing.assert_array_equal(np.asarray(leaf.shards[1][0]), before)


def test_a_group_view_is_put_together_without_moving_anything():
    placed = place_weights(CONFIG, RandomSource(config=CONFIG), DEVICES, jnp.float32, stacked=True)
    mesh = jax.sharding.Mesh(np.array([DEVICES[1], DEVICES[3]]), ("sp", "tp"))
    leaf = placed.tree["layers"]["down"]
    cut = [None] * len(leaf.spec.shape)
    cut[leaf.spec.tp_axis] = "tp"
    view = jax.make_array_from_single_device_arrays(
        leaf.spec.shape,
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*cut)),
        [leaf.shards[instance][rank] for instance in (1, 3) for rank in (0, 1)],
    )
    np.testing.assert_array_equal(np.asarray(view), expected_shard(leaf.spec, 0, 1, np.float32))


@pytest.mark.parametrize("devices", [[], [[]], [DEVICES[0], DEVICES[1][:1]]])
def test_instances_of_unequal_size_are_refused(devices):
    with pytest.raises(ConfigError, match="the same number of devices"):
        place_weights(CONFIG, RandomSource(config=CONFIG), devices, jnp.float32, stacked=False)


def test_layers_are_stacked_on_tpu_only():
    assert [stacks_layers(name) for name in ("cpu", "gpu", "tpu")] == [False, False, True]
