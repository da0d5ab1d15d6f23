"""Host and program read a step's vector in the same places."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from loongjax.esp.meta import MetaLayout
from loongjax.programs.spec import ProgramSpec
from loongjax.sampling.fields import FIELDS, RECENT

SPECS = [
    ProgramSpec(kind="prefill", degree=1, bucket=64, rows=32),
    ProgramSpec(kind="prefill", degree=3, bucket=192, rows=4),
    ProgramSpec(kind="decode", degree=1, bucket=4, rows=4),
    ProgramSpec(kind="decode", degree=4, bucket=8, rows=8),
    ProgramSpec(kind="extend", degree=2, bucket=64, rows=4),
    ProgramSpec(kind="migrate", degree=3, bucket=128, rows=1),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_the_host_writes_the_program_reads(spec):
    layout = spec.layout
    vector = np.full(layout.size, -1, np.int32)
    written = layout.views(vector)
    next_value = 0
    for view in written.values():
        view[...] = next_value + np.arange(view.size).reshape(view.shape)
        next_value += view.size
    # Every place belongs to exactly one field.
    np.testing.assert_array_equal(np.sort(vector), np.arange(layout.size))
    read = jax.jit(layout.views)(vector)
    assert list(read) == sorted(written)  # jit sorts the keys of a dict
    for name, view in written.items():
        assert read[name].shape == view.shape
        np.testing.assert_array_equal(read[name], view)


def test_views_of_the_host_are_views():
    layout = MetaLayout({"pair": (2,), "single": (), "table": (2, 3)})
    assert layout.size == 9
    vector = np.zeros(9, np.int32)
    views = layout.views(vector)
    views["single"][...] = 7
    views["table"][1, 2] = 8
    np.testing.assert_array_equal(vector, [0, 0, 7, 0, 0, 0, 0, 0, 8])


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (
            SPECS[1],
            {
                "token": (192,),
                "position": (192,),
                "target": (192,),
                "score_begin": (),
                "score_end": (),
                "first": (192,),
                "keep": (3, 192),
                "used": (),
                "sample_index": (12,),
                **dict.fromkeys((*FIELDS, "sample_position"), (4,)),
                "rows_used": (),
            },
        ),
        (
            SPECS[3],
            {
                "token": (8,),
                "source": (8,),
                "position": (32,),
                "write": (32,),
                "start": (32,),
                "entries": (32,),
                "update": (32, 4),
                "recent": (8, RECENT),
                **dict.fromkeys((*FIELDS, "sample_position"), (8,)),
                "rows_used": (),
            },
        ),
    ],
)
def test_fields_are_these(spec, shapes):
    layout = spec.layout
    views = layout.views(np.zeros(layout.size, np.int32))
    assert {name: view.shape for name, view in views.items()} == shapes


def test_names_tell_specs_apart():
    placed = ProgramSpec(kind="decode", degree=2, bucket=4, rows=4, placement=(2, 3))
    names = {spec.name for spec in [*SPECS, placed]}
    assert len(names) == len(SPECS) + 1
    assert placed.name == "decode-d2-t4-r4-on-2-3"
