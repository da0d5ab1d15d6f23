"""LoongServe's policy in the real engine: every transition of the paper happens, and no token
depends on it.

Short and long prompts come to four emulated instances; the script is fixed, and so is the plan.
What happened is read off the step records, of which the timeline is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from loongjax.engine import StepRecord
from loongjax.plan import Group, RequestId
from loongjax.sampling.params import SamplingParams
from loongjax.scheduler.policies.loongserve import LoongServe
from tests.engine.on_devices import SLOTS, TOKENS, count_ties, document
from tests.engine.scripted import Role, perform
from tests.scheduler.analytic_cost import AnalyticCost

pytestmark = [
    pytest.mark.usefixtures("without_shape_checks"),
    pytest.mark.xdist_group("engines on devices"),
]

# The times of a large model, with a thousand times as much for each token: a pool of 64 tokens
# then is what 64,000 are there.
COST = AnalyticCost(token=4e-2, square=7.76e-4, kv=2e-4, row=4e-3, moved=1.2e-4)


def ask(prompt: int, max_tokens: int, comes: int, number: int = 0) -> Role:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Role(prompt=document(number)[:prompt], params=params, comes=comes)


def mixed_load() -> list[Role]:
    """Alone and long; a few that decode while others come; a burst; one that outgrows its
    instance.
    """
    return [
        ask(40, 4, comes=0),
        *(ask(4, 12, comes=12, number=1) for _ in range(6)),
        ask(100, 6, comes=20, number=2),
        *(ask(5 + i, 8, comes=40, number=3) for i in range(10)),
        ask(50, 40, comes=80),
    ]


class Transitions:
    """Reads transitions off records, in the order of launches."""

    def __init__(self, records: Sequence[StepRecord]) -> None:
        self._records = sorted(records, key=lambda record: record.seq)
        self._decodes: dict[RequestId, list[StepRecord]] = {}
        for record in self._records:
            for name in record.requests if record.kind == "decode" else ():
                self._decodes.setdefault(name, []).append(record)
        self.seen = Counter(name for record in self._records for name in self._names(record))

    def _names(self, record: StepRecord) -> Iterator[str]:
        kept = {share.instance for share in record.kept}
        if record.kind == "migrate":
            yield "migration"
        elif record.kind == "prefill":
            if len(kept) < record.degree:
                yield "scale-down"
            decoding = self._groups_around(record)
            if decoding:
                idle = all(set(group).isdisjoint(record.group) for group in decoding)
                yield "idle instances used" if idle else "decode preempted"
        else:
            if len(set(record.masters)) > 1:
                yield "several masters"
            before = self._groups_before(record)
            if before and record.degree > max(map(len, before)):
                fresh = kept.difference(*before)
                yield "scale-up by memory" if fresh else "scale-up by compute"

    def _groups_around(self, prefill: StepRecord) -> list[Group]:
        """Where everybody who decodes before and after it did so last."""
        found = []
        for steps in self._decodes.values():
            before = [step for step in steps if step.seq < prefill.seq]
            if before and len(before) < len(steps):
                found.append(before[-1].group)
        return found

    def _groups_before(self, decode: StepRecord) -> list[Group]:
        """Where each of its requests decoded last; those that begin are left out."""
        steps = [self._decodes[name] for name in decode.requests]
        earlier = [[step for step in own if step.seq < decode.seq] for own in steps]
        return [own[-1].group for own in earlier if own]


def test_every_transition_happens_and_tokens_are_those_of_the_reference(executor):
    roles = mixed_load()
    run = perform(
        executor(TOKENS),
        LoongServe(cost=COST, headroom=8, typical_answer=8),
        roles,
        slots=SLOTS,
        vocab_size=TOKENS.model.vocab_size,
    )
    seen = Transitions(run.steps).seen
    print(dict(seen))
    for name in (
        "idle instances used",
        "decode preempted",
        "migration",
        "scale-down",
        "scale-up by memory",
        "scale-up by compute",
        "several masters",
    ):
        assert seen[name], f"no {name} in {dict(seen)}"
    answers = [answer for role in roles for answer in role.answers]
    assert all(len(a.tokens) == r.params.max_tokens for a, r in zip(answers, roles, strict=True))
    ties = sum(count_ties(role, TOKENS.model) for role in roles)
    assert ties <= 0.005 * sum(len(answer.tokens) for answer in answers)
