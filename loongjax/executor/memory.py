"""How many KV slots an instance gets when the user does not say."""

from __future__ import annotations

from pathlib import Path

import jax

_QUANTUM = 1024
_ACCELERATOR_SHARE = 0.9  # of the memory that weights leave free; the rest is for temporaries
_HOST_SHARE = 0.4  # emulated instances share the host's memory with everything else
_CPU_PROMPTS = 2  # emulated pools hold this many prompts of full length in all, not all memory


def default_slots(
    devices: list[jax.Device], *, instances: int, bytes_per_token: int, max_model_len: int
) -> int:
    """Slots for each instance, rounded to a coarse quantum so that restarts find the same.

    `devices` are those of one instance, with the weights on them already;
    `bytes_per_token` is what a token takes on one device.
    """
    if devices[0].platform == "cpu":
        fits = int(_free_host_bytes() * _HOST_SHARE) // (instances * len(devices) * bytes_per_token)
        wanted = -(-_CPU_PROMPTS * max_model_len // instances)
        return max(_QUANTUM, min(fits, wanted) // _QUANTUM * _QUANTUM)
    free = min(_free_device_bytes(device) for device in devices)
    return max(_QUANTUM, int(free * _ACCELERATOR_SHARE) // bytes_per_token // _QUANTUM * _QUANTUM)


def _free_device_bytes(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))


def _free_host_bytes() -> int:
    info = Path("/proc/meminfo")
    if not info.exists():
        return 4 * 2**30
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
