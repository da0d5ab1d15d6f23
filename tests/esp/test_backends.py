"""The hardware kernels inside the programs of a group of four, interpreted: a chunk, a chunk over
history, and a decode step, with and without a window, against a float32 forward pass. One layer:
programs of interpreted kernels take long to compile.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from loongjax.plan import Chunk, DecodeRow
from tests.esp.lives import Life, expect
from tests.esp.rig import TINY, logits_of

GROUP = (0, 1, 2, 3)


@pytest.mark.parametrize(("backend", "window"), [("interpret", None), ("interpret-tpu", 7)])
def test_a_group_of_four_says_what_the_reference_says(rigs, backend, window):
    rig = rigs(
        instances=4,
        block_size=4,
        slots=64,
        model=replace(TINY, layers=1, windows=(window,)),
        attention_backend=backend,
        max_chunk_tokens=128,
    )
    assert rig.executor.program_counts.attention_backend == backend
    long, short = (
        Life(name=name, tokens=list(range(start, start + 40)), probe=probe, prompt=prompt)
        for name, start, probe, prompt in (("long", 5, 17, 37), ("short", 200, 301, 11))
    )
    rig.admit("long", long.tokens[:20], probe_token=long.probe)
    first = Chunk(request="long", start=0, length=20, last=False)
    rig.extend(GROUP, [first], {"long": {1: 7, 3: 13}})
    for life in (long, short):
        life.computed = life.prompt
        rig.admit(life.name, life.tokens[: life.prompt], probe_token=life.probe)
    chunks = [
        Chunk(request="short", start=0, length=11, last=True),
        Chunk(request="long", start=20, length=17, last=True),
    ]
    found = logits_of(rig.extend(GROUP, chunks, {"short": {0: 11}, "long": {0: 2, 2: 15}}))
    for life in (long, short):
        expect(life, rig.model, found[life.name])
        life.computed += 1
        rig.admit(life.name, life.tokens[: life.computed], probe_token=life.probe)
    rows = [DecodeRow("long", master=2, home=1), DecodeRow("short", master=0, home=0)]
    found = logits_of(rig.decode(GROUP, rows))
    for life in (long, short):
        expect(life, rig.model, found[life.name])
        rig.release(life.name)
