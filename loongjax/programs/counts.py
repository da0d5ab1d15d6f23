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
      unbound: From a group, for want of mappings (`loongjax.programs.mappings`); a step that
        needs the program again waits for it to be rebound.
      compile_s, load_s, rebind_s: What each of these took in all [s]; tracing is part of
        compiling, reading and checking the file of loading.
      attention_backend: Which kernels they are made of (`pallas_kernels.backend_names`); None
        where nothing is compiled.
      compiled_after_warm_up: Compilations of any kind, jax's own small ones too, that a step
        waited for after warm-up had made everything; 0 without warm-up.
    """

    attention_backend: str | None = None
    compiled: int = 0
    loaded: int = 0
    rebound: int = 0
    unbound: int = 0
    compile_s: float = 0.0
    load_s: float = 0.0
    rebind_s: float = 0.0
    compiled_after_warm_up: int = 0

    @property
    def made(self) -> int:
        """How often a step or warm-up had to wait for a program."""
        return self.compiled + self.loaded + self.rebound
