"""What is counted of steps, and what is kept for it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from loongjax.engine import StepRecord
from loongjax.plan import Share
from serving.metrics import Metrics


class Counting:
    """Metrics, and the names of the requests that are open."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        service = SimpleNamespace(model_name="m", engine_names=lambda: self.open)
        self.metrics = Metrics(service)

    def count(self, kind: str, *requests: str, degree: int = 1, **fields) -> None:
        record = StepRecord(
            seq=0, kind=kind, group=tuple(range(degree)), requests=requests, started=0.0, ended=1.0,
            **({"tokens": len(requests), "kept": ()} | fields),
        )  # fmt: skip
        self.metrics.count_steps([record])

    def value(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"loongjax:{name}_total", {"model_name": "m"})


@pytest.fixture
def counting(monkeypatch) -> Counting:
    monkeypatch.setattr("serving.metrics._EngineCollector", lambda service: SilentCollector())
    return Counting()


class SilentCollector:
    """There is no engine to ask."""

    def describe(self) -> list:
        return []

    def collect(self) -> list:
        return []


def test_a_change_of_degree_is_counted(counting):
    for degree in (1, 2, 2, 4, 1):
        counting.count("decode", "a", degree=degree)
        counting.count("decode", "b", degree=2)
    assert (counting.value("scale_ups"), counting.value("scale_downs")) == (2, 1)


def test_what_a_failed_step_did_does_not_count(counting):
    counting.count("decode", "a", degree=1)
    counting.count("decode", "a", degree=2, error="lost")
    counting.count("decode", "a", degree=1)
    assert (counting.value("scale_ups"), counting.value("scale_downs")) == (0, 0)


def test_moved_and_retained_tokens(counting):
    counting.count("migrate", "a", degree=2, tokens=7)
    kept = (Share(instance=0, tokens=30), Share(instance=1, tokens=12))
    counting.count("prefill", "a", degree=4, kept=kept)
    counting.count("prefill", "b", degree=2, kept=kept)  # both that computed them keep them
    assert (counting.value("migrated_tokens"), counting.value("retained_tokens")) == (7, 42)


def test_what_has_ended_is_forgotten_and_what_is_open_is_not(counting):
    counting.open = {"long"}
    counting.count("decode", "long", degree=1)
    for number in range(5_000):
        counting.count("decode", f"short {number}", degree=2)
    assert len(counting.metrics._degrees) <= 1_003
    counting.count("decode", "long", degree=2)
    assert counting.value("scale_ups") == 1


def test_many_open_requests_are_all_followed(counting):
    names = [f"{number}" for number in range(3_000)]
    counting.open = set(names)
    counting.count("decode", *names, degree=2)
    counting.count("decode", *names, degree=4)
    assert counting.value("scale_ups") == 3_000
