"""The drawing of what a request lived through."""

from __future__ import annotations

from loongjax.cli.drawing import draw_request
from loongjax.engine import StepRecord
from loongjax.plan import Share


def record(seq, kind, group, **fields):
    return StepRecord(
        seq=seq,
        kind=kind,
        group=group,
        requests=("r",),
        started=float(seq),
        ended=seq + 0.5,
        **fields,
    )


def test_shows_who_worked_and_where_the_kv_lies():
    records = [
        record(0, "prefill", (0, 1, 2, 3), tokens=6000, kept=(Share(1, 3000), Share(2, 3000))),
        record(1, "decode", (1, 2), tokens=1, kept=(Share(2, 1),), masters=(1,)),
        record(2, "decode", (1, 2), tokens=1, kept=(Share(2, 1),), masters=(1,)),
    ]
    lines = draw_request(records, 4).splitlines()
    assert lines[0].split() == ["inst", "0", "inst", "1", "inst", "2", "inst", "3"]
    assert lines[1].startswith("prefill at degree 4")
    assert lines[1].count("█") == 24
    assert lines[3].split()[-4:] == ["·", "3,000", "3,000", "·"]
    assert lines[4].startswith("decode at degree 2")
    assert lines[4].split()[4:] == ["·", "▒▒▒▒", "M", "▒▒▒▒", "·"]
    assert "2 tokens" in lines[5]


def test_shows_where_moved_kv_arrived():
    records = [
        record(3, "migrate", (1, 2), tokens=3002, kept=(Share(1, 3002),)),
        record(4, "decode", (1,), tokens=1, kept=(Share(1, 1),), masters=(1,)),
    ]
    lines = draw_request(records, 4).splitlines()
    assert lines[1].startswith("migrate at degree 2")
    assert lines[1].split()[4:] == ["·", "3,002", "·", "·"]
    assert lines[2].strip() == "3,002 KV tokens moved: 0.5 s"
    assert lines[3].startswith("decode at degree 1")
