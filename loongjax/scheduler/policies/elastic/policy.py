"""Beyond LoongServe: prompts in chunks that can be overtaken, and a degree for each of them.

LoongServe's prompts cannot be interrupted, so that a short one waits behind a long one; their order
is that of arrival; and a prompt that is on its way keeps its instances. Here everything follows
from time. Whoever decodes has its next token due `decode_s` after the one before, counted from its
first (`clock`). Whoever waits becomes the more urgent the longer it waits, compared with what its
prompt takes (`order`). One plan is made in this order:

1. Requests that decode and have no room left for their next token (`seating`).
2. Lanes: groups for prompts that take long, while decodes keep instances of their own (`lanes`);
   decodes that are in their way move to those (`gathering`).
3. Prompts, the most urgent first (`prompts`), in steps that carry decodes along and last as long as
   those can wait (`fused`).
4. All other decodes.

A pure function of the snapshot and the clock. Promises as `LoongServe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loongjax.costmodel.protocol import CostModel
from loongjax.errors import ConfigError
from loongjax.plan import DecodeStep, Group, Plan, Reason, Rejection, Snapshot
from loongjax.scheduler.policies.continuing import groups_to_go_on
from loongjax.scheduler.policies.elastic.clock import Clock
from loongjax.scheduler.policies.elastic.order import AloneTimes, Order
from loongjax.scheduler.policies.elastic.prompts import Prompts
from loongjax.scheduler.policies.elastic.reasons import PREEMPTED
from loongjax.scheduler.policies.seating import Seating
from loongjax.scheduler.policies.worktable import Worktable, preempt_last


@dataclass(frozen=True, kw_only=True, slots=True)
class Elastic:
    """The policy. See the module.

    Attributes:
      cost: Predicts how long steps take.
      headroom: Tokens beyond the known ones that memory is kept for when a prompt is admitted, for
        everyone who holds KV; None: all that each may generate. Lower: more requests at once, more
        of them preempted and computed anew.
      decode_s: The time from token to token that everyone is to have in the mean [s]; set it a
        little below the objective. Higher: longer steps, more throughput.
      chunk_s: How long a step may last that computes prompts [s], unless the least part that is
        worth it takes longer: whoever comes waits for its end. Higher: constants weigh less, short
        prompts wait longer.
      floor_s: Prompts that take less than this alone on all instances [s] are served as they
        came. Higher: more of them.
      reject_late: Turns new requests away whose deadline passes before their prompt can be
        computed, were they alone.
    """

    cost: CostModel
    headroom: int | None = 512
    decode_s: float = 0.045
    chunk_s: float = 0.5
    floor_s: float = 0.04
    reject_late: bool = False
    _alone: dict[int, AloneTimes] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.headroom is not None and self.headroom < 0:
            raise ConfigError(
                f"headroom must not be negative, got {self.headroom}; None keeps memory for all "
                "that a request may generate"
            )
        for name in ("decode_s", "chunk_s"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.floor_s >= 0.0:
            raise ConfigError(f"floor_s must not be negative, got {self.floor_s}")

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        """See `Policy`."""
        table = Worktable(snapshot, self.headroom)
        seating = Seating(table, grows=True)
        decodes: list[DecodeStep] = []
        anyone_idle = bool(table.idle)
        seating.seat_the_short()
        clock = Clock(table, self.cost, now, self.decode_s)
        degree = snapshot.topology.degrees[-1]
        alone = self._alone.get(degree)
        if alone is None:
            alone = self._alone[degree] = AloneTimes(self.cost, degree, self.floor_s)
        order = Order(alone, now)
        reject = self._hopeless(snapshot, order) if self.reject_late else ()
        if reject:
            return Plan(reject=reject)
        prompts = Prompts(table, self.cost, clock, order, chunk_s=self.chunk_s)
        if anyone_idle:
            prompts.seat()
            seating.seat_the_rest()
            seating.grow_for_compute(self.cost)
            decodes = seating.steps(snapshot.next_seq + len(prompts.steps), self.cost)
        if not prompts.steps and not decodes and not table.soon and not table.late:
            prompts.rescue()
            if not prompts.steps:
                preempt_last(table)
        steps = (*prompts.steps, *decodes)
        ahead = frozenset[Group]()
        if not table.preempted and not prompts.anyone_waits:
            ahead = groups_to_go_on(table, decodes, grows=True, cost=self.cost)
        reasons = prompts.reasons | dict.fromkeys(table.preempted, PREEMPTED)
        return Plan(
            steps=steps,
            preempt=tuple(table.preempted),
            ahead=ahead,
            reasons=tuple([Reason(*each) for each in reasons.items()]),
        )

    def _hopeless(self, snapshot: Snapshot, order: Order) -> tuple[Rejection, ...]:
        """New requests that cannot have their first token by their deadline."""
        found = []
        for view in snapshot.waiting:
            if view.kv or view.generated or view.id in snapshot.in_flight:
                continue
            slack = order.slack_s(view)
            if slack < 0.0:
                text = (
                    f"its deadline cannot be met: its prompt of {view.length} tokens would be "
                    f"computed {-slack:.2f} s too late if it began now"
                )
                found.append(Rejection(view.id, text))
        return tuple(found)
