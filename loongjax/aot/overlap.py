"""How much of the ring's communication a compiled program hides, by the chip's peak rates.

A hop is hidden where the schedule has attention between its start and its end that takes at least
as long as the transfer. Both are taken at their peaks: arithmetic in no time at all would hide
nothing, and a program may not count on slow kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loongjax.aot.hlo import Hop, Program
from loongjax.costmodel.hardware import HardwareDescription
from loongjax.programs.build import ProgramShapes
from pallas_kernels.backends import kernels_of
from pallas_kernels.causal_tiles import causal_pairs

ATTENTION = "striped_attention"  # the kernel's name in compiled programs


@dataclass(frozen=True, kw_only=True, slots=True)
class RingStep:
    """One step of the ring on one rank, at peak rates.

    Attributes:
      flops: Of attention of one stripe to another, counted from the kernel's grid.
      bytes: That each rank sends: K and V of its stripe.
      attention_s: The least time of the attention.
      transfer_s: The least time of the transfer to a neighbour.
    """

    flops: int
    bytes: int
    attention_s: float
    transfer_s: float

    @property
    def is_long(self) -> bool:
        """Whether attention takes longer than the transfer, so that it can hide it."""
        return self.attention_s > self.transfer_s


def ring_step(shapes: ProgramShapes, hardware: HardwareDescription, tokens: int) -> RingStep:
    """The ring step of a prefill program of `tokens` local tokens."""
    flops = fold_flops(shapes, tokens)
    kv_heads = shapes.config.kv_heads // shapes.tp
    sent = 2 * tokens * kv_heads * shapes.config.head_dim * shapes.dtype.itemsize
    return RingStep(
        flops=flops,
        bytes=sent,
        attention_s=flops / hardware.flops_per_s,
        transfer_s=sent / hardware.neighbour_bytes_per_s,
    )


def fold_flops(shapes: ProgramShapes, tokens: int) -> int:
    """Arithmetic of one call of `fold_stripe` on one rank where one prompt fills the stripe:
    all tiles of its grid that any query sees, two products each.
    """
    c = shapes.config
    kernels = kernels_of(shapes.attention_backend, shapes.chip)
    tiles = kernels.fold_tiles(tokens, c.head_dim, shapes.dtype.itemsize)
    scores = causal_pairs(tokens, tiles) * tiles.queries * tiles.keys
    return 4 * scores * (c.heads // shapes.tp) * c.head_dim


def overlap(program: Program, ring: Sequence[Hop], step: RingStep) -> float | None:
    """The share of the ring's bytes whose hop is hidden; None where there is no hop."""
    total = sum(hop.bytes * hop.runs for hop in ring)
    hidden = 0
    for hop in ring:
        calls = sum(program.kernel_calls(each, ATTENTION) for each in hop.between)
        transfer_s = step.transfer_s * hop.bytes / step.bytes
        if calls * step.attention_s >= transfer_s:
            hidden += hop.bytes * hop.runs
    return hidden / total if total else None
