"""What a step feeds its program, against a definition that goes token by token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.executor.inputs import (
    DecodeFrame,
    StepInputs,
    prefill_inputs,
    stripe_tokens,
)
from loongjax.executor.protocol import RequestInput
from loongjax.executor.token_log import TokenLog
from loongjax.kvcache import BlockTable, DecodeSlots, PrefillSlots, ShareSlots
from loongjax.plan import Chunk, DecodeRow, DecodeStep, Placement, PrefillStep, Share
from loongjax.programs.spec import ProgramSpec
from loongjax.sampling.fields import NO_TOKEN
from loongjax.sampling.params import SamplingParams

BLOCK_SIZE, BLOCKS, TRASH, INSTANCES = 4, 64, 256, 6
BUCKET, ROWS = 64, 4
SPARE = 399
VOCAB = 1000


@dataclass
class Prefill:
    """A random prefill step; `home[request][t]` is (instance, slot) of token t of the chunk."""

    step: PrefillStep
    slots: PrefillSlots
    home: dict[str, list[tuple[int, int]]]
    logs: dict[str, TokenLog]
    tokens: dict[str, list[int]]


def log_of(name: str, tokens: list[int]) -> TokenLog:
    number = int(name[1:])
    return TokenLog(
        RequestInput(
            id=name,
            token_ids=tuple(tokens),
            params=SamplingParams(temperature=0.5 + number),
            seed=1000 + number,
        ),
        VOCAB,
    )


def groups(draw, least: int = 1) -> tuple[int, ...]:
    found = draw(st.sets(st.integers(0, INSTANCES - 1), min_size=least, max_size=4))
    return tuple(sorted(found))


def slots_for(positions: range, free: list[int]) -> list[tuple[int, int, int]]:
    """Entries for consecutive positions: new blocks in any order, the first one perhaps
    filled from its middle on."""
    entries, at = [], positions.start
    inside = positions.start % BLOCK_SIZE
    while at < positions.stop:
        count = min(BLOCK_SIZE - inside, positions.stop - at)
        entries.append((free.pop() * BLOCK_SIZE + inside, at, count))
        at, inside = at + count, 0
    return entries


def draw_prefill(draw) -> Prefill:
    group = groups(draw)
    free = {i: draw(st.permutations(range(BLOCKS))) for i in group}
    chunks, keep, shares = [], [], []
    case = Prefill(None, None, {}, {}, {})
    room = BUCKET
    for number in range(draw(st.integers(1, 4))):
        if not room:
            break
        length = draw(st.integers(1, min(40, room * len(group))))
        room -= stripe_tokens(length, len(group))
        name, start, last = f"r{number}", draw(st.integers(0, 9)), draw(st.booleans())
        more = 0 if last else draw(st.integers(1, 5))
        case.tokens[name] = [100 * number + t for t in range(start + length + more)]
        case.logs[name] = log_of(name, case.tokens[name])
        chunks.append(Chunk(request=name, start=start, length=length, last=last))
        order = draw(st.permutations(group))
        cuts = draw(st.lists(st.integers(0, length), max_size=len(group) - 1))
        edges = [0, *sorted(cuts), length]
        case.home[name], placed = [], []
        for instance, low, high in zip(order, edges, edges[1:], strict=False):
            if low == high:
                continue
            entries = slots_for(range(start + low, start + high), free[instance])
            placed.append(Share(instance, high - low))
            shares.append(
                ShareSlots(request=name, instance=instance, entries=np.array(entries, np.int32))
            )
            case.home[name] += [
                (instance, slot + i) for slot, _, count in entries for i in range(count)
            ]
        keep.append(Placement(request=name, shares=tuple(placed)))
    case.step = PrefillStep(seq=1, group=group, chunks=tuple(chunks), keep=tuple(keep))
    case.slots = PrefillSlots(seq=1, shares=tuple(shares))
    return case


def fields_of(spec: ProgramSpec, inputs: StepInputs) -> list[dict[str, np.ndarray]]:
    (meta,) = inputs.metas
    assert meta.dtype == np.int32
    assert meta.shape == (spec.degree, spec.layout.size)
    return [spec.layout.views(vector) for vector in meta]


def check_sampling(spec, fields, rows, position_of) -> None:
    """Each row's parameters stand at its place and nowhere else."""
    places = [place for _, place in rows]
    assert len(set(places)) == len(places)
    counts = [sum(place // spec.rows == rank for place in places) for rank in range(spec.degree)]
    for rank, field in enumerate(fields):
        assert field["rows_used"] == max(counts)
        # Rows of a rank are its first ones: the program samples only `rows_used`.
        assert {p % spec.rows for p in places if p // spec.rows == rank} == set(range(counts[rank]))
        for name in ("temperature", "seed", "sample_position"):
            assert not field[name][counts[rank] :].any()
    for request, place in rows:
        rank, row = divmod(place, spec.rows)
        number = int(request[1:])
        assert fields[rank]["temperature"][row : row + 1].view(np.float32) == 0.5 + number
        assert fields[rank]["seed"][row] == 1000 + number
        assert fields[rank]["sample_position"][row] == position_of(request)


@settings(max_examples=60)
@given(data=st.data())
def test_prefill_inputs_equal_their_definition(data):
    case = draw_prefill(data.draw)
    step, degree = case.step, len(case.step.group)
    spec = ProgramSpec(kind="prefill", degree=degree, bucket=BUCKET, rows=ROWS)
    inputs = prefill_inputs(spec, step, case.slots, case.logs, TRASH)
    fields = fields_of(spec, inputs)
    wanted = {
        "token": np.zeros((degree, BUCKET), int),
        "position": np.zeros((degree, BUCKET), int),
        "first": np.tile(np.arange(BUCKET), (degree, 1)),
        "keep": np.full((degree, degree, BUCKET), TRASH),
    }
    place_of_token = {}
    at = 0
    for chunk in step.chunks:
        for t in range(chunk.length):
            rank, local = t % degree, at + t // degree
            place_of_token[chunk.request, t] = rank, local
            wanted["token"][rank, local] = case.tokens[chunk.request][chunk.start + t]
            wanted["position"][rank, local] = chunk.start + t
            instance, slot = case.home[chunk.request][t]
            keeper = step.group.index(instance)
            hop = (keeper - rank) % degree  # hops from the token's rank to its keeper
            wanted["keep"][keeper, hop, local] = slot
        end = at + -(-chunk.length // degree)
        wanted["first"][:, at:end] = at
        at = end
    for name, values in wanted.items():
        np.testing.assert_array_equal([field[name] for field in fields], values, err_msg=name)
    assert [int(field["used"]) for field in fields] == [at] * degree

    ends = {chunk.request: chunk for chunk in step.chunks if chunk.last}
    assert [name for name, _ in inputs.rows] == list(ends)
    index = np.full((degree, degree * ROWS), NO_TOKEN)
    for name, place in inputs.rows:
        rank, local = place_of_token[name, ends[name].length - 1]
        index[rank, place] = local
    np.testing.assert_array_equal([field["sample_index"] for field in fields], index)
    check_sampling(spec, fields, inputs.rows, lambda name: len(case.tokens[name]))


@settings(max_examples=60)
@given(data=st.data())
def test_decode_inputs_equal_their_definition(data):
    group = groups(data.draw)
    degree = len(group)
    spec = ProgramSpec(kind="decode", degree=degree, bucket=ROWS, rows=ROWS)
    tables = [BlockTable(capacity=400, block_size=BLOCK_SIZE) for _ in group]
    step_rows, slots, positions, logs, running = [], [], [], {}, {}
    for number in range(data.draw(st.integers(1, 6))):
        room = [i for i in group if sum(row.master == i for row in step_rows) < ROWS]
        if not room:
            break
        name = f"r{number}"
        logs[name] = log_of(name, [100 * number + t for t in range(1 + number)])
        for generated in range(data.draw(st.integers(0, 3))):
            logs[name].append(5000 + 10 * number + generated)
        for table in tables:
            entries = data.draw(st.integers(0, 3))
            first = 10 * number * BLOCK_SIZE
            table.append(
                name,
                np.array([[first + 8 * i, 4 * i, 4] for i in range(entries)], np.int32).reshape(
                    -1, 3
                ),
            )
        row = DecodeRow(name, data.draw(st.sampled_from(room)), data.draw(st.sampled_from(group)))
        step_rows.append(row)
        slots.append(data.draw(st.integers(0, TRASH - 1)))
        # The newest token is on the host, or it is still an output of the last step.
        positions.append(len(logs[name]) - 1)
        if data.draw(st.booleans()):
            positions[-1] += 1
            running[name] = data.draw(st.integers(0, degree * ROWS - 1))
    step = DecodeStep(seq=1, group=group, rows=tuple(step_rows))
    plan = DecodeSlots(seq=1, slots=tuple(slots), positions=tuple(positions))
    frame = DecodeFrame(spec, step, logs, TRASH, SPARE)
    frame.inputs(step, plan, tables, running)
    inputs = frame.inputs(step, plan, tables, running)  # as good as the first time
    fields = fields_of(spec, inputs)

    assert [name for name, _ in inputs.rows] == [row.request for row in step_rows]
    group_rows = degree * ROWS
    wanted = {
        "token": np.zeros((degree, ROWS), int),
        "source": np.full((degree, ROWS), NO_TOKEN),
        "position": np.zeros((degree, group_rows), int),
        "write": np.full((degree, group_rows), TRASH),
        "start": np.zeros((degree, group_rows), int),
        "entries": np.zeros((degree, group_rows), int),
        "update": np.tile([SPARE, 0, 0, 0], (degree, group_rows, 1)),
    }
    for (name, place), row, slot, position in zip(
        inputs.rows, step_rows, slots, positions, strict=True
    ):
        assert place // ROWS == group.index(row.master)
        if name in running:
            wanted["source"][place // ROWS, place % ROWS] = running[name]
        else:
            wanted["token"][place // ROWS, place % ROWS] = logs[name][-1]
        wanted["position"][:, place] = position
        wanted["write"][group.index(row.home), place] = slot
        for rank, table in enumerate(tables):
            wanted["start"][rank, place], wanted["entries"][rank, place] = table.region(name)
    for name, values in wanted.items():
        np.testing.assert_array_equal([field[name] for field in fields], values, err_msg=name)
    position_of = dict(zip(logs, positions, strict=True))
    check_sampling(spec, fields, inputs.rows, lambda name: position_of[name] + 1)


@given(length=st.integers(1, 1000), degree=st.integers(1, 8))
def test_stripes_hold_a_chunk_with_less_than_one_token_of_padding_each(length, degree):
    assert 0 <= stripe_tokens(length, degree) * degree - length < degree


@given(prompt=st.integers(1, 5), more=st.lists(st.integers(0, 99), max_size=20))
def test_a_token_log_is_its_prompt_and_what_was_generated(prompt, more):
    log = log_of("r0", list(range(prompt)))
    for token in more:
        log.append(token)
        assert log[-1] == token
    assert len(log) == prompt + len(more)
    assert log.every(1, 0, 1000).tolist() == list(range(prompt)) + more
    assert log.every(2, 1, 1000).tolist() == (list(range(prompt)) + more)[1::2]
