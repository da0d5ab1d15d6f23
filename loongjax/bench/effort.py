"""How much a benchmark measures. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
      repeats: Timings behind each median of speed.
      cpu_repeats: Timings behind each median of CPU time, which varies less.
      decode_tokens: That each request generates in a decode cell.
      host_steps: Decode steps behind each mean of host time.
      dtypes: Which are measured.
    """

    repeats: int = 5
    cpu_repeats: int = 3
    decode_tokens: int = 65
    host_steps: int = 100
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


QUICK = Effort(repeats=1, cpu_repeats=1, decode_tokens=33, host_steps=20)
