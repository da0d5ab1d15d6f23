"""How programs came to be. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramCounts:
    """How an executor's programs came to be.

    Attributes:
      compiled: Here, in this process.
      loaded: From disk.
      rebound: To another group, from one that was compiled or loaded.
    """

    compiled: int = 0
    loaded: int = 0
    rebound: int = 0
