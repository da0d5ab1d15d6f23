"""First come, first served, with continuous batching and elastic degrees.

The policy that serves when nothing is known about the hardware: no cost model, and a pure
function of the snapshot. What it promises to everyone: whoever is admitted gets on, whoever
waits is admitted in the end, and the pool can be used to its last block.

One plan is made in this order:
1. Requests that decode and have no room left for their next token (`decodes`).
2. Prompts, strictly in line (`prompts`), on idle instances, long ones in chunks. They go
   before other decodes; but where a chunk was computed, everyone who decodes gets a token
   before the next one.
3. KV that is spread for want of memory that is free again moves together (`consolidate`).
4. All other decodes that can run.

Decodes go on by themselves (`Plan.ahead`) where nobody waits for their instances (`onward`).

A preempted request is computed anew from its first token on, whatever its length.
"""

from __future__ import annotations

from dataclasses import dataclass

from loongjax.errors import ConfigError
from loongjax.plan import DecodeStep, Plan, Snapshot, Step
from loongjax.scheduler.policies.board import Board
from loongjax.scheduler.policies.consolidate import Consolidation
from loongjax.scheduler.policies.decodes import Decodes
from loongjax.scheduler.policies.onward import groups_to_go_on
from loongjax.scheduler.policies.prompts import Prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstCome:
    """First come, first served. See the module.

    Attributes:
      tokens_per_rank: Prompt tokens that keep one rank busy. A prompt gets the smallest
        degree that leaves each rank no more, and short prompts are packed up to here. Lower:
        long prompts are answered sooner, on more instances, at more communication. If too
        few instances are idle or decode, a prompt takes fewer: it does not wait for other
        prompts.
      headroom: Tokens beyond the known ones that memory is kept for when a prompt is
        admitted, for it and for every request nearby. Lower: more requests at once, and more
        of them preempted and computed anew.
    """

    tokens_per_rank: int = 1024
    headroom: int = 256

    def __post_init__(self) -> None:
        if self.tokens_per_rank < 1:
            raise ConfigError(f"tokens_per_rank must be at least 1, not {self.tokens_per_rank}")
        if self.headroom < 0:
            raise ConfigError(f"headroom must not be negative, got {self.headroom}")

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`. Does not look at the clock."""
        board = Board(snapshot, self.headroom)
        decodes = Decodes(board)
        decodes.seat_the_short()
        prompts = Prompts(board, self.tokens_per_rank)
        prompts.seat()
        consolidation = Consolidation(board, prompts.held_up)
        consolidation.seat()
        decodes.seat_the_rest()
        steps: list[Step] = []
        for part in (prompts, consolidation, decodes):
            steps += part.steps(snapshot.next_seq + len(steps))
        return Plan(
            steps=tuple(steps),
            preempt=tuple(board.preempted),
            ahead=groups_to_go_on(board, [s.group for s in steps if isinstance(s, DecodeStep)]),
        )
