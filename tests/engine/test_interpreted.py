"""The engine over the hardware kernels, interpreted: a group of four under a policy that plans at
random. One layer: programs of interpreted kernels take long to compile.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from loongjax.sampling.params import SamplingParams
from scripts.random_policy import RandomPolicy
from tests.engine.on_devices import SLOTS, Stage, count_ties, document, make_executor
from tests.engine.scripted import Role, perform
from tests.esp.rig import TINY

PATIENCE = 40
"""Plans that are made at random, so that the script comes to its end."""


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("backend", "window"), [("interpret", 7), ("interpret-tpu", None)])
def test_an_engine_over_interpreted_kernels_says_what_the_reference_says(backend, window, tmp_path):
    stage = Stage(
        model=replace(TINY, layers=1, windows=(window,)),
        instances=4,
        block_size=4,
        degrees=(4,),
        attention_backend=backend,
    )
    cast = [
        Role(
            prompt=document(i)[:length],
            params=SamplingParams(temperature=temperature, seed=i, max_tokens=5, n=n),
            comes=comes,
        )
        for i, (length, temperature, n, comes) in enumerate(
            [(90, 0.0, 1, 0), (3, 1.0, 2, 0), (41, 0.0, 1, 4)]
        )
    ]
    executor = make_executor(stage, tmp_path)
    try:
        policy = RandomPolicy(seed=1, patience=PATIENCE)
        run = perform(
            *(executor, policy, cast), slots=SLOTS, vocab_size=stage.model.vocab_size, seed=1
        )
    finally:
        executor.close()
    assert run.stats.attention_backend == backend
    assert {len(record.group) for record in run.steps} == {4}
    assert {record.kind for record in run.steps} >= {"prefill", "decode"}
    ties = sum(count_ties(role, stage.model) for role in cast)
    assert ties <= 1
