"""LoongServe's scheduler (SOSP '24, section 5): elastic groups by a measured cost model.

One plan is made in this order:
1. Requests that decode and have no room left for their next token (`seating`).
2. Prompts (`prefills`): dispatch, allocate, batching, scale-down; migration of decodes to
   make room for them.
3. All other decodes that can run; groups that are compute bound scale up.
4. Which decodes go on by themselves until there is something to decide (`continuing`).

A pure function of the snapshot, as every policy: what the paper's manager remembers of the
past (how long answers are) is estimated from the requests that decode. Where it plans for all
instances in one iteration, this plans for those that are idle, and lets prompts wait for
others. Requests are never rejected, and preempted only when a request that came before them
has no room for its next token.

Promises, like `FirstCome`: whoever is admitted gets on, whoever waits is admitted in the end,
and the pool can be used to its last block.
"""

from __future__ import annotations

from dataclasses import dataclass

from loongjax.costmodel.protocol import CostModel
from loongjax.errors import ConfigError
from loongjax.plan import DecodeStep, Group, Plan, Snapshot
from loongjax.scheduler.policies.continuing import groups_to_go_on
from loongjax.scheduler.policies.prefills import Prefills
from loongjax.scheduler.policies.seating import Seating
from loongjax.scheduler.policies.worktable import Worktable, preempt_last


@dataclass(frozen=True, kw_only=True, slots=True)
class LoongServe:
    """The paper's policy. See the module.

    Attributes:
      cost: Predicts how long steps take.
      headroom: Tokens beyond the known ones that memory is kept for when a prompt is
        admitted, for everyone who holds KV. None, as in the paper: as many as each may
        generate, so that hardly anyone is ever preempted; but a user who sets no limit gets
        the pool almost alone. Lower: more requests at once, more of them spread over several
        instances, or preempted and computed anew.
      typical_answer: Tokens of a typical answer, as long as few requests decode. Higher:
        prompts pause decodes sooner.
      migrates: Whether decodes are moved together to make room for prompts.
      scale_up: Whether groups that decode take further instances when memory or compute is
        short. Without it they do only if a request could not end otherwise.
      patience: How long others may overtake a prompt that has to wait, since it came, as a
        multiple of what it takes alone on all instances. 0, as in the paper: never. More:
        instances are idle less often, and short prompts wait less for long ones, which wait
        longer. The published code lets a number of plans overtake instead, tuned for each data
        set; a policy that remembers nothing has the clock alone.
      block_s: A prompt that takes longer than this on all instances [s] leaves one of them to
        others, unless it needs all, or has lost its patience. Else whoever comes waits for its
        end. Higher: such prompts take less time, and short ones are held up more.
      decode_s: What a decode step should take at most [s]. KV is kept on as many instances as
        read it in that time, and a prompt gets no fewer, if any number does. Set it a little
        below the objective for the time from token to token. Higher: long contexts take fewer
        instances, and those that decode beside them wait for them. In the paper there is no
        limit, and prompts of more than about 180K tokens on one A800 instance miss its own
        objective of 50 ms.
    """

    cost: CostModel
    headroom: int | None = 512
    typical_answer: int = 256
    migrates: bool = True
    scale_up: bool = True
    patience: float = 0.0
    decode_s: float = 0.045
    block_s: float = 3.0

    def __post_init__(self) -> None:
        if self.headroom is not None and self.headroom < 0:
            raise ConfigError(
                f"headroom must not be negative, got {self.headroom}; None keeps memory for all "
                "that a request may generate"
            )
        if self.typical_answer < 1:
            raise ConfigError(f"typical_answer must be at least 1, not {self.typical_answer}")
        if not self.patience >= 0.0:
            raise ConfigError(f"patience must not be negative, got {self.patience}")
        if not self.block_s >= 0.0:
            raise ConfigError(f"block_s must not be negative, got {self.block_s}")
        if not self.decode_s > 0.0:
            raise ConfigError(f"decode_s must be positive, got {self.decode_s}")

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`. Looks at the clock for patience alone."""
        table = Worktable(snapshot, self.headroom)
        seating = Seating(table, grows=self.scale_up)
        prefills = Prefills(
            table,
            self.cost,
            typical_answer=self.typical_answer,
            migrates=self.migrates,
            decode_s=self.decode_s,
            patience=self.patience,
            block_s=self.block_s,
        )
        decodes: list[DecodeStep] = []
        if table.idle:
            seating.seat_the_short()
            prefills.seat(now)
            seating.seat_the_rest()
            seating.grow_for_compute(self.cost)
            decodes = seating.steps(snapshot.next_seq + len(prefills.steps), self.cost)
        steps = (*prefills.steps, *decodes)
        if not steps and not table.soon and not table.late:
            preempt_last(table)
        ahead = frozenset[Group]()
        if not prefills.anyone_waits(now):
            ahead = groups_to_go_on(table, decodes, grows=self.scale_up, cost=self.cost)
        return Plan(steps=steps, preempt=tuple(table.preempted), ahead=ahead)
