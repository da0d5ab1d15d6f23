"""What a device's memory holds, and how many KV slots that leaves room for.

Pure arithmetic but for `free_bytes`. All sizes are bytes of one device.

On accelerators the pool takes what weights, programs and their temporaries leave. On CPU the
devices are emulated and share the host with everything else: a pool holds a few prompts of
full length and takes a modest share of the memory at most; nothing is measured there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import jax

from loongjax.errors import ConfigError

QUANTUM = 1024
_MARGIN = 0.05  # of an accelerator: small inputs, outputs, and gaps between buffers
_HOST_SHARE = 0.4  # of what the host has free, when a pool is sized
_HOST_MOST = 0.8  # of it, when a pool was sized before
_HOST_UNKNOWN = 4 << 30  # taken to be free where the system does not say
_CPU_PROMPTS = 2  # emulated pools hold this many prompts of full length in all, not all memory

_log = logging.getLogger(__name__)

Origin: TypeAlias = Literal["given", "measured", "stored"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramMemory:
    """What compiled programs say of their memory.

    Attributes:
      weight_bytes: The weights, in the layout that the compiler chose.
      slot_bytes: One KV slot with its part of the table, likewise.
      temporary_bytes: Of the program that takes most while it runs; steps that touch a device
        run one after the other.
      code_bytes: Of all programs that stay loaded.
    """

    weight_bytes: int
    slot_bytes: int
    temporary_bytes: int
    code_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """The memory that a pool has to fit into.

    Attributes:
      available_bytes: What is free before weights are placed.
      weight_bytes: The weights.
      slot_bytes: One KV slot, with its part of the block table.
      programs: What programs need beside; None on CPU.
      wanted: Slots that are enough, in quanta; None: as many as fit.
    """

    available_bytes: int
    weight_bytes: int
    slot_bytes: int
    programs: ProgramMemory | None = None
    wanted: int | None = None

    @property
    def slots(self) -> int:
        """Slots of a new pool, rounded down to `QUANTUM`. Raises ConfigError if none fit."""
        if self.programs is None:
            bytes_left = int((self.available_bytes - self.weight_bytes) * _HOST_SHARE)
        else:
            bytes_left = self._beside_programs - int(self.available_bytes * _MARGIN)
        fits = bytes_left // self.slot_bytes // QUANTUM * QUANTUM
        if fits < QUANTUM:
            raise ConfigError(
                f"a device has {self.available_bytes / 1e6:,.0f} MB free, and weights and programs "
                f"leave {max(bytes_left, 0) / 1e6:,.0f} MB for KV: room for less than {QUANTUM} "
                f"slots of {self.slot_bytes:,} bytes. Use more devices per instance, fewer "
                "emulated instances, bfloat16, or give pool slots"
            )
        return fits if self.wanted is None else min(fits, self.wanted)

    @property
    def most(self) -> int:
        """The largest pool that fits now: the bound for one that was sized before."""
        if self.programs is None:
            return int((self.available_bytes - self.weight_bytes) * _HOST_MOST) // self.slot_bytes
        return self._beside_programs // self.slot_bytes

    @property
    def _beside_programs(self) -> int:
        assert self.programs is not None
        return (
            self.available_bytes
            - self.weight_bytes
            - self.programs.temporary_bytes
            - self.programs.code_bytes
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What lies in one device's memory.

    Attributes:
      room: What there is, and what weights and programs take of it.
      slots: KV slots of each instance.
      origin: Whether the number was given, found now, or found at an earlier start.
    """

    room: Room
    slots: int
    origin: Origin

    @property
    def pool_bytes(self) -> int:
        """The pool with its block table."""
        return self.slots * self.room.slot_bytes


def given_slots(room: Room, slots: int) -> MemoryPlan:
    """The plan with a number that the user gave. Raises ConfigError if it cannot fit."""
    free = room.available_bytes - room.weight_bytes
    if slots * room.slot_bytes > free:
        raise ConfigError(
            f"{slots:,} pool slots of {room.slot_bytes:,} bytes take "
            f"{slots * room.slot_bytes / 1e6:,.0f} MB, but a device has {max(free, 0) / 1e6:,.0f} "
            f"MB beside the weights: at most {max(free, 0) // room.slot_bytes:,} slots"
        )
    return MemoryPlan(room=room, slots=slots, origin="given")


def wanted_on_cpu(instances: int, max_model_len: int) -> int:
    """Slots for each emulated instance that are enough to see elasticity at work."""
    return -(-_CPU_PROMPTS * max_model_len // instances // QUANTUM) * QUANTUM


def free_bytes(device: jax.Device, sharing: int) -> int:
    """What is free on a device, or, on CPU, its share of what `sharing` devices have."""
    if device.platform == "cpu":
        return _free_host_bytes() // sharing
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))


def _free_host_bytes(root: Path = Path("/")) -> int:
    """Of the machine, or of the container that this runs in."""
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = [int(lines["MemAvailable"].split()[0]) << 10]
    else:
        free = [_HOST_UNKNOWN]
        _log.warning(
            "there is no %s to say how much memory is free: taking it for %d MiB, by which KV "
            "pools are sized; give pool slots if that is wrong",
            *(meminfo, _HOST_UNKNOWN >> 20),
        )
    group = root / "sys/fs/cgroup"
    limit = group / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        free.append(max(int(text) - used, 0))
    return min(free)
