"""How much compiled code this process may still map. Imports no jax.

XLA's CPU compiler maps each kernel of a program by itself, code, constants and data: hundreds of
mappings for a small program, thousands for a large one. Linux grants a process 65,530 of them
(`vm.max_map_count`); past that LLVM cannot allocate, and the process dies. Elsewhere, and on
accelerators, there is always room.
"""

from __future__ import annotations

from pathlib import Path

_MAPS = Path("/proc/self/maps")
_MOST = Path("/proc/sys/vm/max_map_count")
_SHARE = 0.7
"""Of what is granted; the rest is for threads, files and a program that is being made."""


def has_room() -> bool:
    """Whether another program may be mapped. Takes some 20 ms where very many are."""
    most = most_mappings()
    return most is None or count_mappings() < _SHARE * most


def most_mappings() -> int | None:
    """What the system grants a process; None: it does not say."""
    return int(_MOST.read_text()) if _MOST.exists() else None


def count_mappings() -> int:
    """What this process has; 0 where the system does not say."""
    return _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0
