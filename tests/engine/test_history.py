"""Records are kept up to a bound, and found by request."""

from __future__ import annotations

from loongjax.engine.history import History, make_record
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Placement,
    PrefillStep,
    Share,
    StepResult,
)


def decode(seq: int, *requests: str) -> DecodeStep:
    rows = tuple(DecodeRow(name, master=1, home=0) for name in requests)
    return DecodeStep(seq=seq, group=(0, 1), rows=rows)


def result(seq: int, error: str | None = None) -> StepResult:
    return StepResult(seq=seq, error=error, started=1.0, ended=2.0)


def test_record_of_a_prefill_adds_up_what_each_instance_kept() -> None:
    step = PrefillStep(
        seq=3,
        group=(0, 1, 2),
        chunks=(
            Chunk(request="a", start=0, length=9, last=True),
            Chunk(request="b", start=4, length=5, last=False),
        ),
        keep=(
            Placement(request="a", shares=(Share(0, 3), Share(2, 6))),
            Placement(request="b", shares=(Share(0, 0), Share(2, 5))),
        ),
    )
    record = make_record(step, result(3))
    assert (record.kind, record.degree, record.tokens) == ("prefill", 3, 14)
    assert record.kept == (Share(0, 3), Share(2, 11))
    assert record.requests == ("a", "b")
    assert record.masters == ()


def test_record_of_a_decode_step_names_masters_and_homes() -> None:
    record = make_record(decode(4, "a", "b"), result(4, error="lost a chip"))
    assert (record.kind, record.tokens, record.kept) == ("decode", 2, (Share(0, 2),))
    assert record.masters == (1, 1)
    assert (record.started, record.ended, record.error) == (1.0, 2.0, "lost a chip")


def test_oldest_records_go_first() -> None:
    history = History(max_records=3)
    for seq in range(5):
        history.add_step(decode(seq, "a" if seq < 2 else "b"), result(seq))
    assert [record.seq for record in history.steps()] == [2, 3, 4]
    assert history.steps_of("a") == ()
    assert [record.seq for record in history.steps_of("b")] == [2, 3, 4]


def test_records_of_large_batches_are_bounded_too() -> None:
    history = History(max_mentions=5)
    for seq in range(4):
        history.add_step(decode(seq, "a", "b"), result(seq))
    assert [record.seq for record in history.steps()] == [2, 3]
    assert [record.seq for record in history.steps_of("b")] == [2, 3]
