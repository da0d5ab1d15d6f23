"""With blocks of one token every slot of every instance can be used, on emulated devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Placement,
    Plan,
    PrefillStep,
    RequestView,
    Share,
    Snapshot,
)
from loongjax.sampling.params import SamplingParams
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.scheduler.policy import Policy
from tests.engine.on_devices import SLOTS, TOKENS, count_ties, document
from tests.engine.scripted import Role, Run, perform

pytestmark = pytest.mark.xdist_group("engines on devices")

TOTAL = 4 * SLOTS


class LastTogether:
    """First come, first served, but all take their last step together."""

    def __init__(self) -> None:
        self._inner = FirstCome()

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        others = [view for view in snapshot.running if view.computed < view.peak - 1]
        if others or snapshot.waiting or snapshot.in_flight:
            plan = self._inner.schedule(now, replace(snapshot, running=tuple(others)))
            return replace(plan, ahead=frozenset())  # nobody goes on to the last step by himself
        return Plan(steps=(self._last_step(snapshot.running, snapshot),))

    def _last_step(self, views: Sequence[RequestView], snapshot: Snapshot) -> DecodeStep:
        homes = [view.id for view in snapshot.instances for _ in range(view.free_slots)]
        rows = [DecodeRow(v.id, home, home) for v, home in zip(views, homes, strict=False)]
        return DecodeStep(seq=snapshot.next_seq, group=(0, 1, 2, 3), rows=tuple(rows))


class OneEach:
    """The first four requests begin on an instance each; from there on it is first come."""

    def __init__(self) -> None:
        self._inner = FirstCome()

    def schedule(self, now: float, snapshot: Snapshot) -> Plan:
        begun = {view.id for view in snapshot.waiting if view.kv} | snapshot.in_flight
        first = [view for view in snapshot.waiting if view.id not in begun and view.id < "r4"]
        if not first:
            return self._inner.schedule(now, snapshot)
        return Plan(
            steps=tuple(
                _prefill(view, snapshot.next_seq + i, instance=int(view.id[1]))
                for i, view in enumerate(first)
            )
        )


def _prefill(view: RequestView, seq: int, *, instance: int) -> PrefillStep:
    chunk = Chunk(request=view.id, start=0, length=view.length, last=True)
    keep = Placement(request=view.id, shares=(Share(instance, view.length),))
    return PrefillStep(seq=seq, group=(instance,), chunks=(chunk,), keep=(keep,))


def serve(executor, cast: list[Role], policy: Policy) -> Run:
    run = perform(executor(TOKENS), policy, cast, slots=SLOTS, vocab_size=TOKENS.model.vocab_size)
    assert [role.end.reason for role in cast] == ["length"] * len(cast)
    assert sum(count_ties(role, TOKENS.model) for role in cast) == 0
    return run


def role(peak: int, number: int, *, max_tokens: int = 5, comes: int = 0) -> Role:
    """A request that needs `peak` slots, no more and no less, before its end."""
    max_tokens = min(peak, max_tokens)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    prompt = document(number)[: peak + 1 - max_tokens]
    return Role(prompt=prompt, params=params, comes=comes)


cuts = st.lists(st.integers(1, TOTAL - 1), max_size=9, unique=True).map(sorted)


@pytest.mark.usefixtures("without_shape_checks")
def test_requests_that_fill_the_pool_run_to_their_end(executor):
    """None is refused or preempted, whichever parts of the pool they need."""
    played: list[tuple[int, int]] = []

    @settings(max_examples=25)
    @given(cuts)
    def cases(edges: list[int]) -> None:
        peaks = [b - a for a, b in zip([0, *edges], [*edges, TOTAL], strict=True)]
        if max(peaks) > 1:  # some need a last step
            cast = [role(peak, number % 4) for number, peak in enumerate(peaks)]
            run = serve(executor, cast, LastTogether())
            if all(peak > 1 for peak in peaks):  # one token is answered by its prefill
                assert run.fullest == TOTAL
                played.append((len(peaks), run.fullest))
            assert run.stats.preemptions == 0

    cases()
    print(f"(requests, most slots in use of {TOTAL}): {played}")
    assert max(played)[0] > 4


@pytest.mark.usefixtures("without_shape_checks")
def test_as_first_come_serves_them(executor):
    run = serve(executor, [role(TOTAL, 0)], FirstCome())
    assert run.fullest == TOTAL
    cast = [role(peak, i) for i, peak in enumerate([5, 123, 40, 64, 17, 7])]
    run = serve(executor, cast, FirstCome())
    print(f"6 requests that need {TOTAL} slots in all: {run.fullest} in use at once")
    assert run.stats.preemptions == 0


@pytest.mark.usefixtures("without_shape_checks")
def test_a_request_gets_the_last_free_slots_wherever_they_lie(executor):
    """Four hold KV on every instance; what is left, in four places, is enough for a fifth."""
    holders = [role(peak, i, max_tokens=12) for i, peak in enumerate([60, 51, 57, 49])]
    late = role(TOTAL - 60 - 51 - 57 - 49, 4, max_tokens=2, comes=6)
    run = serve(executor, [*holders, late], OneEach())
    assert late.end.timings.end < min(holder.end.timings.end for holder in holders)
    assert run.stats.preemptions == 0
    prefill = next(step for step in run.steps if "r4" in step.requests)
    assert len(prefill.kept) > 1
