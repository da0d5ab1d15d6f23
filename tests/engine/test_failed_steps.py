"""A step fails on emulated devices, of every kind and at every moment of its life.

Its instances' pools are lost. Who had KV there is computed anew, nobody else notices, and
everybody says what the reference says.
"""

from __future__ import annotations

import pytest

from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    MigrateStep,
    Move,
    Placement,
    Plan,
    PrefillStep,
    RequestView,
    Share,
    Snapshot,
    Step,
)
from loongjax.sampling.params import SamplingParams
from tests.engine.on_devices import SLOTS, TOKENS, count_ties, document
from tests.engine.sabotage import MOMENTS, Moment
from tests.engine.scripted import Role, Run, perform

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.xdist_group("engines on devices")]

GROUPS = {"r0": (0, 1), "r1": (2,), "r2": (1, 3)}
ERRORS = {
    "launch": "no launch",
    "donated": "the pool is gone",
    "device": "a chip fell off",
    "fetch": "deleted",
}


class Apart:
    """Each request has a group of its own, where it is computed in two chunks, in turns with
    others there; once, some of the first one's KV moves.
    """

    def __init__(self) -> None:
        self._moved = False

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        steps: list[Step] = []
        busy = {view.id for view in snapshot.instances if view.busy_seq is not None}
        views = (*snapshot.running, *snapshot.waiting)
        for view in sorted(views, key=lambda v: -1 if v.last_seq is None else v.last_seq):
            if busy.isdisjoint(GROUPS[view.id]):
                steps.append(self._step(view, snapshot.next_seq + len(steps), snapshot))
                busy.update(GROUPS[view.id])
        return Plan(steps=tuple(steps))

    def _step(self, view: RequestView, seq: int, snapshot: Snapshot) -> Step:
        group = GROUPS[view.id]
        if view in snapshot.waiting:
            length = view.uncomputed if view.computed else view.uncomputed // 2
            chunk = Chunk(
                request=view.id, start=view.computed, length=length, last=view.computed > 0
            )
            half = length // len(group)
            shares = (Share(group[0], length - half * (len(group) - 1)),)
            shares += tuple(Share(instance, half) for instance in group[1:])
            keep = Placement(request=view.id, shares=shares)
            return PrefillStep(seq=seq, group=group, chunks=(chunk,), keep=(keep,))
        if view.id == "r0" and not self._moved:
            self._moved = True
            return MigrateStep(seq=seq, group=group, moves=(Move("r0", 0, 1, 3),))
        return DecodeStep(seq=seq, group=group, rows=(DecodeRow(view.id, group[0], group[-1]),))


def kind_of(step: Step) -> str:
    if isinstance(step, PrefillStep):
        return "extend" if step.chunks[0].start else "prefill"
    return "migrate" if isinstance(step, MigrateStep) else "decode"


def serve_with_a_failure(executor, cast: list[Role], kind: str, moment: Moment) -> Run:
    """The first step of a kind on instances 0 and 1 fails; all requests end well all the same."""
    failed: list[int] = []

    def fails(step: Step) -> Moment | None:
        if failed or kind_of(step) != kind or step.group != (0, 1):
            return None
        failed.append(step.seq)
        return moment

    run = perform(
        executor(TOKENS),
        Apart(),
        cast,
        slots=SLOTS,
        vocab_size=TOKENS.model.vocab_size,
        fails=fails,
    )
    assert [role.end.reason for role in cast] == ["length"] * len(cast)
    assert sum(count_ties(role, TOKENS.model) for role in cast) == 0
    return run


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["prefill", "extend", "decode", "migrate"])
def test_only_those_with_kv_there_are_computed_anew(executor, kind: str, moment: Moment):
    params = SamplingParams(temperature=0, max_tokens=6)
    cast = [Role(prompt=document(i)[: 30 + i], params=params) for i in range(2)]
    run = serve_with_a_failure(executor, cast, kind, moment)
    assert (run.stats.failed_steps, run.stats.recomputed_requests) == (1, 1)
    (broken,) = (step for step in run.steps if step.error is not None)
    assert ERRORS[moment] in broken.error
    untouched = [step.kind for step in run.steps if "r1" in step.requests]
    assert untouched == ["prefill"] * 2 + ["decode"] * 5


def test_neighbour_on_one_of_the_lost_instances_is_computed_anew(executor):
    """The third shares instance 1 with the first, whose step fails."""
    params = SamplingParams(temperature=0, max_tokens=6)
    cast = [Role(prompt=document(i)[: 20 + i], params=params) for i in range(3)]
    run = serve_with_a_failure(executor, cast, "decode", "device")
    assert run.stats.recomputed_requests == 2
