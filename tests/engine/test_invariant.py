"""What a request says under any schedule, with aborts and failures, on emulated devices.

A random policy plans whatever the rules allow: groups, degrees, chunks, homes, masters,
migrations, preemptions. Requests come and go meanwhile, and steps fail at every moment of
their lives. Every token that anybody is told is held against a plain float32 forward pass.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.executor.jax_executor import JaxExecutor
from loongjax.plan import Step
from loongjax.sampling.params import SamplingParams
from scripts.random_policy import RandomPolicy
from tests.engine.on_devices import BLOCKS, SLOTS, TOKENS, Stage, count_ties, document
from tests.engine.sabotage import MOMENTS, Moment
from tests.engine.scripted import Answer, Role, Run, perform

pytestmark = [
    pytest.mark.usefixtures("without_shape_checks", "quiet"),
    pytest.mark.xdist_group("engines on devices"),
]


PATIENCE = 80
"""Plans that are made at random, so that a case comes to its end."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request; `comes` and `leaves` count polls, `leaves` from its coming."""

    document: int
    prompt: float
    max_tokens: int
    temperature: float
    n: int
    comes: int
    leaves: int | None


@dataclass(frozen=True, kw_only=True)
class Script:
    """A drawn case.

    Attributes:
      asks: The requests.
      slots: Of each instance, that may be used.
      trouble: How probable it is that a step fails.
      seed: Of the policy, of failures, and of the order in which steps end.
    """

    asks: list[Ask]
    slots: int
    trouble: float
    seed: int


asks = st.builds(
    Ask,
    document=st.integers(0, 3),
    prompt=st.sampled_from([0.01, 0.05, 0.2, 0.4, 0.7, 1.0]),
    max_tokens=st.integers(1, 8),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    n=st.sampled_from([1, 1, 1, 2, 4]),
    comes=st.integers(0, 12),
    leaves=st.one_of(st.none(), st.none(), st.integers(1, 30)),
)
scripts = st.builds(
    Script,
    asks=st.lists(asks, min_size=1, max_size=4),
    slots=st.sampled_from([28, 40, SLOTS]),
    trouble=st.sampled_from([0.0, 0.05, 0.2]),
    seed=st.integers(0, 9999),
)


@dataclass
class Tally:
    """What all cases of a test were, in sum."""

    seen: Counter[str] = field(default_factory=Counter)

    def add(self, cast: list[Role], run: Run, ties: int) -> None:
        """Takes the sums of one case."""
        self.seen["cases"] += 1
        self.seen["ties"] += ties
        self.seen["failed steps"] += len(run.failed)
        self.seen["cases with failures"] += bool(run.failed)
        self.seen["recomputed requests"] += run.stats.recomputed_requests
        self.seen["preemptions"] += run.stats.preemptions
        for count in run.stats.steps:
            self.seen[f"{count.kind} at degree {count.degree}"] += count.count
        for role in cast:
            self.seen["forked prompts"] += len(role.answers) > 1
            for answer in role.answers:
                self.seen["tokens"] += len(answer.tokens)
                self.seen[f"ended by {answer.end.reason}"] += 1
        prefills = [step.requests for step in run.steps if step.kind == "prefill"]
        chunks = Counter(name for requests in prefills for name in requests)
        self.seen["prompts in chunks"] += sum(count > 1 for count in chunks.values())
        self.seen["packed prefills"] += sum(len(requests) > 1 for requests in prefills)

    def check(self, degrees: range) -> None:
        """Everything happened, and ties were rare. `pytest -rP` shows the sums."""
        print(dict(sorted(self.seen.items())))
        for degree in degrees:
            for kind in ("prefill", "decode", "migrate") if degree > 1 else ("prefill", "decode"):
                assert self.seen[f"{kind} at degree {degree}"]
        for what in (
            "failed steps",
            "recomputed requests",
            "preemptions",
            "prompts in chunks",
            "forked prompts",
        ):
            assert self.seen[what], what
        assert all(self.seen[f"ended by {reason}"] for reason in ("length", "abort", "error"))
        assert self.seen["packed prefills"]
        assert self.seen["ties"] <= 0.005 * self.seen["tokens"]


def cast_role(ask: Ask, instances: int, slots: int) -> Role:
    """Its last token needs no slot, and so a request may have one more than there are."""
    prompt = document(ask.document)[: max(1, round(ask.prompt * 25 * instances))]
    max_tokens = min(ask.max_tokens, instances * slots + 1 - len(prompt))
    params = SamplingParams(
        temperature=ask.temperature, n=ask.n, seed=ask.document, max_tokens=max_tokens
    )
    leaves = None if ask.leaves is None else ask.comes + ask.leaves
    return Role(prompt=prompt, params=params, comes=ask.comes, leaves=leaves)


def play(script: Script, executor: JaxExecutor, stage: Stage, tally: Tally) -> None:
    cast = [cast_role(ask, stage.instances, script.slots) for ask in script.asks]
    luck = random.Random(script.seed)

    def fails(step: Step) -> Moment | None:
        return luck.choice(MOMENTS) if luck.random() < script.trouble else None

    run = perform(
        executor,
        RandomPolicy(seed=script.seed, patience=PATIENCE),
        cast,
        slots=script.slots,
        vocab_size=stage.model.vocab_size,
        fails=fails,
        seed=script.seed,
    )
    for role in cast:
        for answer in role.answers:
            check_end(role, answer, run)
    tally.add(cast, run, sum(count_ties(role, stage.model) for role in cast))


def check_end(role: Role, answer: Answer, run: Run) -> None:
    match answer.end.reason:
        case "length":
            assert len(answer.tokens) == role.params.max_tokens
        case "abort":
            assert role.leaves is not None
        case "error":
            assert "lost to 2 failed steps" in answer.end.error
            assert len(run.failed) >= 2
        case reason:
            raise AssertionError(reason)


def test_token_granularity_and_windows(executor):
    tally = Tally()

    @settings(max_examples=500)
    @given(scripts)
    def cases(script: Script) -> None:
        play(script, executor(TOKENS), TOKENS, tally)

    cases()
    tally.check(range(1, 5))


def test_blocks(executor):
    tally = Tally()

    @settings(max_examples=500)
    @given(scripts)
    def cases(script: Script) -> None:
        play(script, executor(BLOCKS), BLOCKS, tally)

    cases()
    tally.check(range(1, 3))
