"""How many KV slots there are: the arithmetic, and what is measured and kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from loongjax.cluster.mesh import GroupMeshes
from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.errors import ConfigError
from loongjax.executor import create, memory, sizing
from loongjax.executor.create import plan_executor
from loongjax.executor.memory import QUANTUM, ProgramMemory, Room, given_slots, wanted_on_cpu
from loongjax.programs.catalogue import Catalogue
from tests.esp.rig import TINY

GB = 10**9
PROGRAMS = ProgramMemory(
    weight_bytes=16 * GB, slot_bytes=131_072, temporary_bytes=3 * GB, code_bytes=GB
)
ROOM = Room(available_bytes=80 * GB, weight_bytes=16 * GB, slot_bytes=131_072, programs=PROGRAMS)


def test_an_accelerators_pool_gets_what_weights_and_programs_leave():
    left = (80 - 16 - 3 - 1 - 0.05 * 80) * GB
    assert ROOM.slots % QUANTUM == 0
    assert 0 <= left - ROOM.slots * ROOM.slot_bytes < QUANTUM * ROOM.slot_bytes
    assert ROOM.slots < ROOM.most <= (80 - 16 - 3 - 1) * GB // ROOM.slot_bytes


def test_on_cpu_a_pool_is_as_large_as_is_of_use_and_takes_a_share_at_most():
    room = Room(available_bytes=10 * GB, weight_bytes=GB, slot_bytes=1000, wanted=8192)
    assert room.slots == 8192
    fits = replace(room, wanted=10**9).slots
    assert 3.5 * GB < fits * 1000 < 3.6 * GB
    assert fits % QUANTUM == 0


@pytest.mark.parametrize(
    ("instances", "length", "slots"),
    [(1, 4096, 8192), (4, 8192, 4096), (4, 100, 1024), (3, 5000, 4096)],
)
def test_emulated_pools_hold_two_prompts_of_full_length(instances, length, slots):
    assert wanted_on_cpu(instances, length) == slots
    assert instances * slots >= 2 * length


@pytest.mark.parametrize(
    "room",
    [
        replace(ROOM, available_bytes=20 * GB),
        Room(available_bytes=10, weight_bytes=9, slot_bytes=1),
    ],
)
def test_memory_without_room_is_refused(room):
    with pytest.raises(ConfigError, match=r"room for less than 1024 slots .*Use more devices"):
        _ = room.slots


def test_given_slots_are_taken_exactly_if_they_fit():
    assert given_slots(ROOM, 777).slots == 777
    with pytest.raises(ConfigError, match=r"1,000,000 pool slots .* at most 488,281 slots"):
        given_slots(ROOM, 1_000_000)


def test_free_memory_of_a_machine_and_of_a_container(tmp_path, caplog):
    assert memory._free_host_bytes(tmp_path) == 4 << 30
    assert "proc/meminfo to say how much memory is free: taking it for 4096 MiB" in caplog.text
    caplog.clear()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:  2048 kB\n")
    assert memory._free_host_bytes(tmp_path) == 2 << 20
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert memory._free_host_bytes(tmp_path) == 2 << 20
    (group / "memory.max").write_text("1048576\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert memory._free_host_bytes(tmp_path) == 1048576 - 500000
    assert not caplog.text


# ---- sizing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "placed", "chunks", "others"),
    [
        (EverySubset(1), False, 3, 3),
        (Neighbours(4, (1, 2, 4)), False, 4 * 3, 3 + 2 * 4 + 4),  # of one, two and one group
        (AlignedSlices(8), True, 4 * 3, 3 + 3 * 4),
    ],
)
def test_an_instance_holds_a_program_for_each_of_its_groups(topology, placed, chunks, others):
    catalogue = Catalogue(topology, max_chunk_tokens=1000, max_rows=32, placed=placed)
    assert sizing.programs_per_instance(catalogue) == (chunks, others)


@pytest.fixture
def config(tmp_path):
    return EngineConfig(
        cluster=ClusterConfig(instances=2), max_model_len=100, program_dir=tmp_path / "programs"
    )


def measured(config: EngineConfig) -> ProgramMemory:
    plan = plan_executor(TINY, config)
    nominal = replace(plan.shapes, slots=QUANTUM)
    return sizing.measure(nominal, plan.catalogue, GroupMeshes(plan.grid))


def test_what_the_compiler_says_is_what_was_reckoned(config):
    """On CPU, layouts are not padded, and code is not counted."""
    found, room = measured(config), plan_executor(TINY, config).memory.room
    table_bytes = 4 * 32 * 2 * TINY.vocab_size  # of 32 rows; the rest of the step's inputs is small
    wanted = 2 * room.weight_bytes + table_bytes  # weights are not shared
    assert found.weight_bytes == pytest.approx(wanted, rel=0.02)
    assert found.slot_bytes == pytest.approx(room.slot_bytes, rel=0.02)
    assert 0 < found.temporary_bytes < 10**8


class Accelerator:
    """Makes `plan_executor` believe that emulated devices have memory of their own."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.free = 1_000_000_000
        self.measured = 0
        patch.setattr(create, "free_bytes", lambda device, sharing: self.free)
        patch.setattr(sizing, "measure", self.measure)
        patch.setattr(sizing, "is_measured", lambda platform: True)

    def measure(self, *_) -> ProgramMemory:
        self.measured += 1
        return ProgramMemory(
            weight_bytes=0, slot_bytes=0, temporary_bytes=1_000_000, code_bytes=1000
        )


def test_the_size_is_measured_once_and_found_again(config, monkeypatch, caplog):
    device = Accelerator(monkeypatch)
    first = plan_executor(TINY, config).memory
    assert (first.origin, device.measured) == ("measured", 1)
    assert first.slots == 1024  # wanted on CPU, of far more that fit
    second = plan_executor(TINY, config).memory
    assert (second.origin, device.measured, second.slots) == ("stored", 1, first.slots)
    assert second.room == first.room

    other = replace(config, pool=PoolConfig(block_size=32))
    assert plan_executor(TINY, other).memory.origin == "measured"
    given = replace(config, pool=PoolConfig(slots=5000))
    assert plan_executor(TINY, given).memory.slots == 5000
    assert device.measured == 2


def test_a_stored_size_that_does_not_suit_any_more_is_found_anew(config, monkeypatch, caplog):
    """Without measuring again: what programs need has not changed."""
    device = Accelerator(monkeypatch)
    wanted = replace(config, max_model_len=4096, cluster=ClusterConfig(instances=1))

    def slots(free: int) -> tuple[int, str]:
        device.free = free
        plan = plan_executor(TINY, wanted).memory
        return plan.slots, plan.origin

    assert slots(10**9) == (8192, "measured")
    assert slots(5_000_000) == (6144, "measured")
    assert "memory is too small now" in caplog.text
    assert slots(10**9) == (6144, "stored")  # a little more would not be worth compiling for
    assert slots(3_200_000) == (2048, "measured")
    caplog.clear()
    assert slots(10**9) == (8192, "measured")
    assert "memory is too large now" in caplog.text
    assert device.measured == 1


@pytest.mark.parametrize(
    "note", [{}, {"slots": "many", "programs": None}, {"slots": 5, "programs": 3}]
)
def test_a_stored_size_that_makes_no_sense_is_found_anew(config, note, caplog):
    plan = plan_executor(TINY, config)
    (path,) = (config.program_dir).glob("pool-*.json")
    key = json.loads(path.read_text())["key"]
    plan.store.save_note(key, note)
    again = plan_executor(TINY, config).memory
    assert (again.origin, again.slots) == ("measured", plan.memory.slots)
    assert "not using the stored size of the KV pool" in caplog.text


def test_limits_that_are_rounded_are_said_in_the_log(config, caplog):
    with caplog.at_level("INFO"):
        plan = plan_executor(TINY, replace(config, max_chunk_tokens=2000, max_model_len=4096))
    assert plan.catalogue.max_chunk_tokens == 2048
    assert "chunks of 2000 tokens are rounded up to 2048, a compiled size" in caplog.text
