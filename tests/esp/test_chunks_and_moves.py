"""The invariant through chunked prefill over history, and through migration.

Drawn lives of a few requests: prompts come in chunks, each on a group of its own choice that
holds the history; KV moves between instances at any time; decode steps in between. Every
logit that comes out is held against a plain float32 forward pass over the same tokens.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.esp.history import Trips, history_trips
from loongjax.plan import Chunk, DecodeRow, Move
from pallas_kernels.striped_attention import tile_size
from tests.esp.lives import Life, draw_group, draw_shares, expect
from tests.esp.rig import WINDOWED, Rig, logits_of

pytestmark = [
    pytest.mark.usefixtures("without_shape_checks"),
    pytest.mark.xdist_group("probed rigs"),
]

_numbers = itertools.count()


def draw_life(data, model) -> Life:
    prompt = data.draw(st.integers(1, 120), label="prompt")
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000), label="tokens"))
    return Life(
        name=f"c{next(_numbers)}",
        tokens=rng.integers(0, model.vocab_size, prompt + 12).tolist(),
        probe=int(rng.integers(0, model.vocab_size)),
        prompt=prompt,
    )


def run_case(data, rig: Rig, instances: int) -> None:
    lives = [draw_life(data, rig.model) for _ in range(data.draw(st.integers(1, 3)))]
    try:
        for _ in range(data.draw(st.integers(1, 9), label="steps")):
            act = data.draw(st.sampled_from((compute, compute, decode, move)), label="act")
            act(data, rig, instances, lives)
    finally:
        for life in lives:
            rig.release(life.name)
    assert all(rig.allocator.used_slots(i) == 0 for i in range(instances))


def compute(data, rig: Rig, instances: int, lives: list[Life]) -> None:
    """Computes a chunk of some prompts, with or without history, together."""
    company = [life for life in lives if life.computed < life.prompt and data.draw(st.booleans())]
    if not company:
        return
    homes = set().union(*(rig.homes(life.name) for life in company))
    group = draw_group(data, instances, homes)
    chunks, keep = [], {}
    for life in company:
        length = data.draw(st.integers(1, life.prompt - life.computed), label="chunk")
        last = life.computed + length == life.prompt
        chunks.append(Chunk(request=life.name, start=life.computed, length=length, last=last))
        keep[life.name] = draw_shares(data, group, length)
        life.computed += length
        rig.admit(life.name, life.tokens[: life.computed], probe_token=life.probe)
    found = logits_of(rig.extend(group, chunks, keep))
    for life in company:
        if life.computed == life.prompt:
            expect(life, rig.model, found[life.name])
        else:
            assert life.name not in found


def decode(data, rig: Rig, instances: int, lives: list[Life]) -> None:
    ready = [life for life in lives if life.prompt <= life.computed < len(life.tokens)]
    company = [life for life in ready if data.draw(st.booleans())]
    if not company:
        return
    group = draw_group(data, instances, set().union(*(rig.homes(life.name) for life in company)))
    rows = []
    for life in company:
        life.computed += 1
        rig.admit(life.name, life.tokens[: life.computed], probe_token=life.probe)
        master, home = (data.draw(st.sampled_from(group)) for _ in range(2))
        rows.append(DecodeRow(life.name, master, home))
    found = logits_of(rig.decode(group, rows))
    for life in company:
        expect(life, rig.model, found[life.name])


def move(data, rig: Rig, instances: int, lives: list[Life]) -> None:
    """Moves some KV of some requests; a swap between two instances is as good as any."""
    moves = []
    for life in lives:
        for source, tokens in rig.allocator.shares(life.name):
            if data.draw(st.booleans()):
                others = [i for i in range(instances) if i != source]
                target = data.draw(st.sampled_from(others))
                moves.append(Move(life.name, source, target, data.draw(st.integers(1, tokens))))
                break
    if moves:
        touched = {i for one in moves for i in (one.source, one.target)}
        rig.migrate(draw_group(data, instances, touched), moves)


@settings(max_examples=250)
@given(data=st.data())
def test_token_granularity(rigs, data):
    run_case(data, rigs(instances=4, block_size=1, slots=512), 4)


@settings(max_examples=150)
@given(data=st.data())
def test_blocks(rigs, data):
    run_case(data, rigs(instances=4, block_size=16, slots=1024), 4)


@settings(max_examples=150)
@given(data=st.data())
def test_sliding_windows(rigs, data):
    run_case(data, rigs(instances=3, block_size=4, slots=512, model=WINDOWED), 3)


@settings(max_examples=60)
@given(data=st.data())
def test_tensor_parallel_instances(rigs, data):
    run_case(data, rigs(instances=2, tensor_parallel=2, block_size=1, slots=512), 2)


@pytest.mark.parametrize("way", ["queries", "keys"])
@pytest.mark.parametrize("model", ["full", "windowed"])
def test_both_ways_to_history_agree(rigs, monkeypatch, way, model):
    options = {} if model == "full" else {"model": WINDOWED}
    rig = rigs(instances=4, block_size=1, slots=512, **options)

    def forced(spec, tokens: int, items: int) -> Trips:
        tiles = -(-tokens // tile_size(spec.bucket))
        return Trips(query=tiles, key=0) if way == "queries" else Trips(query=0, key=items)

    monkeypatch.setattr(rig.executor, "_trips", forced)
    rng = np.random.default_rng(5)
    life = Life(
        name=f"w{way}", tokens=rng.integers(0, 512, 260).tolist(), probe=3, prompt=250, computed=250
    )
    rig.admit(life.name, life.tokens[:250], probe_token=life.probe)
    spread = {0: 40, 2: 23}
    first = Chunk(request=life.name, start=0, length=63, last=False)
    rig.extend((0, 1, 2), [first], {life.name: spread})
    rest = Chunk(request=life.name, start=63, length=187, last=True)
    found = rig.extend((0, 1, 2, 3), [rest], {life.name: {1: 100, 3: 87}})
    expect(life, rig.model, logits_of(found)[life.name])
    rig.release(life.name)


def test_the_way_with_fewer_bytes_is_taken():
    options = {"bucket": 256, "item_tokens": 128, "query_bytes": 4096, "key_bytes": 2048}
    assert history_trips(tokens=200, items=0, **options) == Trips(query=0, key=0)
    assert history_trips(tokens=200, items=1, **options) == Trips(query=0, key=1)
    assert history_trips(tokens=200, items=100, **options) == Trips(query=1, key=0)
    without = {"passes_keys": False, **options}
    assert history_trips(tokens=200, items=0, **without) == Trips(query=0, key=0)
    assert history_trips(tokens=200, items=1, **without) == Trips(query=1, key=0)
