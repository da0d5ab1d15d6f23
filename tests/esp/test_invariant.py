"""What a request says does not depend on degree, group, homes, masters or company.

Drawn lives of a few requests: each is prefilled by some group, kept anywhere in it, and
decoded by groups that change from step to step, with other requests beside it. Every logit
that comes out is held against a plain float32 forward pass over the same tokens.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.plan import DecodeRow
from tests.esp.lives import Life, draw_group, draw_shares, expect
from tests.esp.rig import WINDOWED, Rig, logits_of

pytestmark = [
    pytest.mark.usefixtures("without_shape_checks"),
    pytest.mark.xdist_group("probed rigs"),
]

_numbers = itertools.count()


def draw_life(data, model) -> Life:
    prompt = data.draw(st.integers(1, 40), label="prompt")
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000), label="tokens"))
    return Life(
        name=f"r{next(_numbers)}",
        tokens=rng.integers(0, model.vocab_size, prompt + 12).tolist(),
        probe=int(rng.integers(0, model.vocab_size)),
        prompt=prompt,
    )


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
    rig.admit(life.name, life.tokens[: life.computed], probe_token=life.probe)


def prefill_all(data, rig: Rig, instances: int, lives: list[Life]) -> None:
    packed = data.draw(st.booleans(), label="packed")
    for batch in [lives] if packed else [[life] for life in lives]:
        group = draw_group(data, instances, set())
        keep = {life.name: draw_shares(data, group, life.prompt) for life in batch}
        for life in batch:
            life.computed = life.prompt
            admit(rig, life)
        found = logits_of(rig.prefill(group, {life.name: life.prompt for life in batch}, keep))
        for life in batch:
            expect(life, rig.model, found[life.name])


def decode_some(data, rig: Rig, instances: int, lives: list[Life]) -> None:
    company = [life for life in lives if data.draw(st.booleans())] or lives[:1]
    group = draw_group(data, instances, set().union(*(rig.homes(life.name) for life in company)))
    rows = []
    for life in company:
        life.computed += 1
        admit(rig, life)
        master, home = (data.draw(st.sampled_from(group)) for _ in range(2))
        rows.append(DecodeRow(life.name, master, home))
    found = logits_of(rig.decode(group, rows))
    for life in company:
        expect(life, rig.model, found[life.name])


@settings(max_examples=200)
@given(data=st.data())
def test_token_granularity(rigs, data):
    run_case(data, rigs(instances=4, block_size=1, slots=512), 4)


@settings(max_examples=100)
@given(data=st.data())
def test_blocks(rigs, data):
    run_case(data, rigs(instances=4, block_size=16, slots=1024), 4)


@settings(max_examples=100)
@given(data=st.data())
def test_sliding_windows(rigs, data):
    run_case(data, rigs(instances=3, block_size=4, slots=512, model=WINDOWED), 3)


@settings(max_examples=60)
@given(data=st.data())
def test_tensor_parallel_instances(rigs, data):
    run_case(data, rigs(instances=2, tensor_parallel=2, block_size=1, slots=512), 2)
