"""Records are kept up to a bound, and found by request."""

from __future__ import annotations

from loongjax.cluster.topology import EverySubset
from loongjax.engine import PoolSample, RequestRecord
from loongjax.engine.history import DECISIONS, History, make_record
from loongjax.engine.messages import Decision
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Placement,
    PrefillStep,
    Reason,
    RequestView,
    Share,
    Snapshot,
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


def test_records_of_a_request_are_all_those_kept_whenever_they_are_asked_for() -> None:
    history = History(max_records=3)
    for seq in range(8):
        history.add_step(decode(seq, "ab"[seq % 2]), result(seq))
        if seq in (0, 1, 6, 7):  # in between, records go that nobody asked for
            for name in "ab":
                kept = [record for record in history.steps() if name in record.requests]
                assert list(history.steps_of(name)) == kept


def test_only_changes_of_the_pool_are_kept() -> None:
    history = History()
    history.add_pool(1.0, [Share(0, 0), Share(1, 8)])
    history.add_pool(2.0, [Share(0, 4), Share(1, 8)])
    history.add_pool(3.0, [Share(1, 0)])
    assert history.pool() == (
        PoolSample(1.0, 1, 8),
        PoolSample(2.0, 0, 4),
        PoolSample(3.0, 1, 0),
    )


def test_of_the_oldest_samples_the_last_of_each_instance_stays() -> None:
    history = History(max_samples=2)
    for time, instance, used in [(1, 0, 1), (2, 0, 2), (3, 1, 3), (4, 2, 4), (5, 2, 5)]:
        history.add_pool(float(time), [Share(instance, used)])
    assert history.pool() == (
        PoolSample(2.0, 0, 2),
        PoolSample(3.0, 1, 3),
        PoolSample(4.0, 2, 4),
        PoolSample(5.0, 2, 5),
    )


def ended(name: str, arrival: float) -> RequestRecord:
    return RequestRecord(
        id=name, prompt=3, generated=2, reason="stop", arrival=arrival, end=arrival + 1
    )


def test_requests_are_those_that_ended_and_those_that_are_open_still() -> None:
    history = History(max_records=2)
    for arrival, name in enumerate(["gone", "a", "b"]):
        history.add_end(ended(name, float(arrival)), "stop")
    views = [
        RequestView(id="b", prompt=3, max_tokens=4, arrival=2.0),  # ended since the snapshot
        RequestView(id="a", prompt=5, max_tokens=4, arrival=7.0, generated=1),  # the name again
    ]
    snapshot = Snapshot(
        version=1,
        next_seq=0,
        block_size=1,
        max_chunk_tokens=8,
        max_rows=8,
        waiting=tuple(views[:1]),
        running=tuple(views[1:]),
        instances=(),
        in_flight=frozenset(),
        topology=EverySubset(1),
    )
    assert history.requests(snapshot) == (
        ended("a", 1.0),
        ended("b", 2.0),
        RequestRecord(id="a", prompt=5, generated=1, arrival=7.0),
    )


def test_of_reasons_the_changes_are_kept_with_the_request() -> None:
    history = History()
    for time, text in enumerate(["waits", "waits", "runs", "waits"]):
        history.add_reasons(float(time), [Reason("a", text), Reason("b", "waits")])
    history.add_end(ended("a", 0.0), "stop")
    (record,) = history.requests()
    assert record.decisions == (
        Decision(0.0, "waits"),
        Decision(2.0, "runs"),
        Decision(3.0, "waits"),
    )
    history.add_end(ended("a", 5.0), "stop")
    assert history.requests()[1].decisions == (), "the name again, of whom nothing was said"


def test_many_reasons_are_kept_up_to_a_bound_and_those_of_a_stem_are_forgotten() -> None:
    history = History()
    for time in range(2 * DECISIONS):
        history.add_reasons(float(time), [Reason("a", str(time)), Reason("stem", "waits")])
    history.add_end(ended("a", 0.0), "stop")
    (record,) = history.requests()
    assert len(record.decisions) == DECISIONS
    assert record.decisions[-1].text == str(2 * DECISIONS - 1)
    history.forget("stem")
    history.add_end(ended("stem", 0.0), "stop")
    assert not history.requests()[1].decisions
