"""How long a step takes: what a plan asks of the devices, in the words of the cost model.

The slowest rank decides. So KV that lies unevenly is charged as if every rank held as much as
the fullest, and masters as if each had as many rows as the busiest. History is read where it
lies, or gathered, whichever is faster: neither is free. Retention during a prefill costs
nothing, as in the program that does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.plan import (
    DecodeStep,
    InstanceId,
    Move,
    PrefillStep,
    RequestId,
    Step,
)


@runtime_checkable
class Holdings(Protocol):
    """Who knows where KV lies."""

    def tokens(self, request: RequestId) -> Mapping[InstanceId, int]:
        """KV tokens of a request by instance."""
        ...


def step_seconds(step: Step, held: Holdings, cost: CostModel) -> float:
    """Predicts a step from what was held before its launch."""
    if isinstance(step, PrefillStep):
        return _prefill(step, held, cost)
    if isinstance(step, DecodeStep):
        return cost.decode(len(step.group), decode_work(step, held))
    return moves_seconds(step.moves, cost)


def decode_work(step: DecodeStep, held: Holdings) -> DecodeWork:
    """A decode step's work, for the rank that has most of each kind."""
    degree, tokens_of = len(step.group), held.tokens
    rows: Counter[InstanceId] = Counter()
    load = dict.fromkeys(step.group, 0)
    longest = 0
    for request, master, home in step.rows:
        rows[master] += 1
        load[home] += 1
        for instance, tokens in tokens_of(request).items():
            load[instance] += tokens
            if tokens > longest:
                longest = tokens
    return DecodeWork(
        rows=max(rows.values()) * len(rows),
        kv_tokens=max(load.values()) * degree,
        masters=len(rows),
        longest=longest * degree,
    )


def _prefill(step: PrefillStep, held: Holdings, cost: CostModel) -> float:
    degree = len(step.group)
    fresh = [ChunkWork(chunk.length, chunk.start) for chunk in step.chunks]
    if not any(chunk.start for chunk in step.chunks):
        return cost.prefill(degree, fresh)
    in_place, gathered = [], 0
    for chunk in step.chunks:
        fullest = max(held.tokens(chunk.request).values(), default=0)
        in_place.append(ChunkWork(chunk.length, max(chunk.start, fullest * degree)))
        gathered += chunk.start if degree > 1 else 0
    return min(cost.prefill(degree, in_place), cost.prefill(degree, fresh) + cost.migrate(gathered))


def moves_seconds(moves: Iterable[Move], cost: CostModel) -> float:
    """All go on at once, and an instance sends and receives at the same time."""
    sent: Counter[InstanceId] = Counter()
    received: Counter[InstanceId] = Counter()
    for move in moves:
        sent[move.source] += move.tokens
        received[move.target] += move.tokens
    return cost.migrate(max(*sent.values(), *received.values()))
