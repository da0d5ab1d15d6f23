from __future__ import annotations

import pytest

from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    MigrateStep,
    Move,
    Placement,
    PrefillStep,
    Share,
)
from loongjax.simulator.scaling import ScalingCounter


def prefill(group: tuple[int, ...], **homes: tuple[int, ...]) -> PrefillStep:
    return PrefillStep(
        seq=0,
        group=group,
        chunks=tuple(
            Chunk(request=name, start=0, length=len(kept), last=True)
            for name, kept in homes.items()
        ),
        keep=tuple(
            Placement(request=name, shares=tuple(Share(i, 1) for i in kept))
            for name, kept in homes.items()
        ),
    )


def decode(group: tuple[int, ...], *names: str) -> DecodeStep:
    rows = tuple(DecodeRow(name, group[0], group[0]) for name in names)
    return DecodeStep(seq=1, group=group, rows=rows)


@pytest.mark.parametrize(
    ("steps", "ups", "downs"),
    [
        ([prefill((0, 1), a=(0, 1)), decode((0, 1), "a")], 0, 0),
        ([prefill((0, 1), a=(0,)), decode((0,), "a"), decode((0,), "a")], 0, 1),
        ([prefill((0, 1), a=(0,), b=(1,))], 0, 0),
        ([prefill((0,), a=(0,)), decode((0, 1), "a"), decode((0, 1), "a")], 1, 0),
        ([prefill((0, 1), a=(0, 1)), decode((0, 1), "a"), decode((0,), "a")], 0, 1),
        ([prefill((0,), a=(0,)), prefill((1, 2), b=(1, 2)), decode((1, 2), "a", "b")], 0, 0),
        ([prefill((0,), a=(0,)), prefill((1,), b=(1,)), decode((0, 1), "a", "b")], 1, 0),
    ],
)
def test_changes_of_degree_are_counted_once(steps, ups, downs):
    counter = ScalingCounter()
    for step in steps:
        counter.add(step)
    assert (counter.ups, counter.downs) == (ups, downs)


def test_moved_tokens_are_summed_and_names_forgotten():
    counter = ScalingCounter()
    moves = (Move("a", 0, 1, 30), Move("b", 1, 0, 12))
    counter.add(MigrateStep(seq=0, group=(0, 1), moves=moves))
    assert counter.migrated_tokens == 42
    counter.add(prefill((0,), a=(0,)))
    counter.forget("a")
    counter.add(decode((0, 1), "a"))
    assert counter.ups == 0
