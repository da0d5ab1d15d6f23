"""What a request says does not depend on degree, group, homes, masters or company.

Drawn lives of a few requests: each is prefilled by some group, kept anywhere in it, and
decoded by groups that change from step to step, with other requests beside it. Every logit
that comes out is held against a plain float32 forward pass over the same tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.plan import DecodeRow
from tests.esp.rig import TINY, WINDOWED, Rig, logits_of, probing, reference_logits

EPSILON = 1e-4  # relative to the largest logit: DESIGN's float32 bound
_numbers = itertools.count()


@dataclass
class Life:
    """One request: all tokens it will ever have, and what is known of it so far."""

    name: str
    tokens: list[int]
    probe: int
    known: int
    homes: set[int] = field(default_factory=set)

    def expect(self, model, got: float) -> None:
        reference = reference_logits(self.tokens, model)
        wanted = reference[self.known - 1, self.probe]
        assert abs(got - wanted) <= EPSILON * np.abs(reference).max()


@pytest.fixture(scope="module")
def rigs(tmp_path_factory):
    """Makes each rig once; programs are traced while `sample` is replaced."""
    made = {}
    folder = tmp_path_factory.mktemp("programs")
    with probing():

        def make(**options):
            key = tuple(sorted(options.items(), key=str))
            if key not in made:
                made[key] = Rig(program_dir=folder, **options)
            return made[key]

        yield make
        for rig in made.values():
            rig.executor.close()


def draw_life(data, model) -> Life:
    length = data.draw(st.integers(1, 40), label="prompt")
    seed = data.draw(st.integers(0, 10_000), label="tokens")
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.vocab_size, length + 12).tolist()
    name = f"r{next(_numbers)}"
    return Life(name, tokens, int(rng.integers(0, model.vocab_size)), length)


def draw_group(data, instances: int, needed: set[int]) -> tuple[int, ...]:
    more = data.draw(st.sets(st.integers(0, instances - 1), min_size=0 if needed else 1))
    return tuple(sorted(needed | more))


def draw_shares(data, group: tuple[int, ...], tokens: int) -> dict[int, int]:
    """Any subset of the group, in any proportion."""
    order = data.draw(st.permutations(group), label="order")
    cuts = data.draw(
        st.lists(st.integers(0, tokens), min_size=len(group) - 1, max_size=len(group) - 1)
    )
    edges = [0, *sorted(cuts), tokens]
    return {i: b - a for i, a, b in zip(order, edges, edges[1:], strict=False)}


def run_case(data, rig: Rig, instances: int) -> None:
    lives = [draw_life(data, rig.model) for _ in range(data.draw(st.integers(1, 3)))]
    try:
        prefill_all(data, rig, instances, lives)
        for _ in range(data.draw(st.integers(1, 6), label="steps")):
            decode_some(data, rig, instances, lives)
    finally:
        for life in lives:
            rig.release(life.name)
    assert all(rig.allocator.used_slots(i) == 0 for i in range(instances))


def admit(rig: Rig, life: Life) -> None:
    rig.admit(life.name, life.tokens[: life.known], probe_token=life.probe)


def prefill_all(data, rig: Rig, instances: int, lives: list[Life]) -> None:
    packed = data.draw(st.booleans(), label="packed")
    for batch in [lives] if packed else [[life] for life in lives]:
        group = draw_group(data, instances, set())
        keep = {life.name: draw_shares(data, group, life.known) for life in batch}
        for life in batch:
            admit(rig, life)
            life.homes |= {i for i, n in keep[life.name].items() if n}
        found = logits_of(rig.prefill(group, {life.name: life.known for life in batch}, keep))
        for life in batch:
            life.expect(rig.model, found[life.name])


def decode_some(data, rig: Rig, instances: int, lives: list[Life]) -> None:
    company = [life for life in lives if data.draw(st.booleans())] or lives[:1]
    group = draw_group(data, instances, set().union(*(life.homes for life in company)))
    rows = []
    for life in company:
        life.known += 1
        admit(rig, life)
        home = data.draw(st.sampled_from(group))
        life.homes.add(home)
        rows.append(DecodeRow(life.name, data.draw(st.sampled_from(group)), home))
    found = logits_of(rig.decode(group, rows))
    for life in company:
        life.expect(rig.model, found[life.name])


@settings(max_examples=200)
@given(data=st.data())
def test_token_granularity(rigs, data):
    run_case(data, rigs(instances=4, block_size=1), 4)


@settings(max_examples=100)
@given(data=st.data())
def test_blocks(rigs, data):
    run_case(data, rigs(instances=4, block_size=16, slots=512), 4)


@settings(max_examples=100)
@given(data=st.data())
def test_sliding_windows(rigs, data):
    run_case(data, rigs(instances=3, block_size=4, model=WINDOWED), 3)


@settings(max_examples=60)
@given(data=st.data())
def test_tensor_parallel_instances(rigs, data):
    run_case(data, rigs(instances=2, tensor_parallel=2, block_size=1, model=TINY), 2)
