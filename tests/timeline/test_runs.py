"""Steps become spans that do not overlap, and spans become runs that lose nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.engine import StepRecord
from loongjax.timeline.runs import row_pieces, runs_of, spans_of
from tests.timeline.story import START, decode, decodes, migrate, prefill, steps


def runs(*records: StepRecord, idle_s: float = 0.01) -> list[tuple[str, tuple[int, ...], int]]:
    """(kind, group, steps) of each run."""
    found = runs_of(spans_of(records, START), idle_s)
    return [(run.kind, run.group, len(run.spans)) for run in found]


def test_decode_steps_on_one_group_are_one_run() -> None:
    assert runs(*steps(), idle_s=0.1) == [
        ("prefill", (0, 1, 2, 3), 1),
        ("decode", (0, 1), 30),
        ("prefill", (2,), 1),
        ("prefill", (3,), 1),
        ("decode", (2,), 20),
        ("migrate", (0, 1), 1),
        ("decode", (0,), 1),
        ("prefill", (1, 3), 1),
        ("decode", (0, 2), 10),
        ("decode", (1, 3), 10),
    ]


def test_a_step_of_others_on_any_instance_ends_a_run() -> None:
    first = decodes(0, 3, (0, 1), 0.0, 0.1, "a")
    then = decodes(9, 2, (0, 1), 0.4, 0.1, "a")
    assert runs(*first, *then, idle_s=1.0) == [("decode", (0, 1), 5)]
    for other in (
        prefill(5, (1,), 0.3, 0.4, "b", kept={1: 4}),
        decode(5, (1, 2), 0.3, 0.4, "b"),
        migrate(5, (0, 1), 0.3, 0.4, "a", target=1, tokens=3),
        decode(5, (0, 1), 0.3, 0.4, "a", error="StepError: lost"),
    ):
        counts = [count for _, _, count in runs(*first, other, *then, idle_s=1.0)]
        assert counts == [3, 1, 2]


def test_others_elsewhere_do_not() -> None:
    other = decode(5, (2,), 0.15, 0.18, "b")
    assert runs(*decodes(0, 5, (0, 1), 0.0, 0.1, "a"), other)[0] == ("decode", (0, 1), 5)


def test_a_rest_ends_a_run_if_it_is_long_for_the_axis_and_for_the_steps() -> None:
    def pause(seconds: float) -> list[StepRecord]:
        return [decode(0, (0,), 0.0, 0.2, "a"), decode(1, (0,), 0.2 + seconds, 0.8, "b")]

    assert len(runs(*pause(0.19), idle_s=0.1)) == 1
    assert len(runs(*pause(0.21), idle_s=0.1)) == 2
    assert len(runs(*pause(0.29), idle_s=0.3)) == 1


def test_chunks_of_a_prompt_stay_apart() -> None:
    chunks = [prefill(i, (0, 1), 0.1 * i, 0.1 * i + 0.1, "a", kept={0: 8}) for i in range(3)]
    assert len(runs(*chunks)) == 3


def test_a_run_adds_up_its_steps() -> None:
    found = runs_of(
        spans_of([*decodes(0, 3, (0, 1), 0.5, 0.1, "a", "b", master=1)], START - 1.0), 0.1
    )
    (run,) = found
    assert (run.begin, run.end, run.tokens) == (pytest.approx(1.5), pytest.approx(1.79), 6)
    assert (run.masters, run.failed) == ({1}, False)


def test_a_step_launched_ahead_begins_when_its_forerunner_ends() -> None:
    ahead = [decode(0, (0, 1), 0.0, 0.4, "a"), decode(1, (0,), 0.1, 0.7, "a")]
    first, second = spans_of(ahead, START)
    assert (first.begin, first.end) == (0.0, pytest.approx(0.4))
    assert (second.begin, second.end) == (first.end, pytest.approx(0.7))


groups = st.sets(st.integers(0, 3), min_size=1).map(lambda group: tuple(sorted(group)))
times = st.integers(0, 40).map(lambda tick: tick / 8)


@given(st.lists(st.tuples(groups, times, times, st.booleans()), max_size=12))
def test_spans_never_overlap_and_runs_lose_none(drawn) -> None:
    records = [
        decode(seq, group, begin, begin + length, "a")
        if is_decode
        else prefill(seq, group, begin, begin + length, "a", kept={group[0]: 1})
        for seq, (group, begin, length, is_decode) in enumerate(drawn)
    ]
    spans = spans_of(records, START)
    assert sorted(span.step.seq for span in spans) == list(range(len(drawn)))
    for instance in range(4):
        here = [span for span in spans if instance in span.step.group]
        assert all(before.end <= after.begin for before, after in pairwise(here))
    found = runs_of(spans, idle_s=0.5)
    seqs = [span.step.seq for run in found for span in run.spans]
    assert sorted(seqs) == list(range(len(drawn)))
    for run in found:
        assert {(span.step.kind, span.step.group) for span in run.spans} == {(run.kind, run.group)}


@pytest.mark.parametrize(
    ("group", "pieces"),
    [((2,), [(2, 2)]), ((0, 1, 2), [(0, 2)]), ((0, 2, 3, 5), [(0, 0), (2, 3), (5, 5)])],
)
def test_neighbours_in_a_group_are_one_piece(group, pieces) -> None:
    assert row_pieces(group) == pieces
