"""loongjax as a subject: the same tokens at every degree, and nothing compiled in between."""

from __future__ import annotations

import pytest

from loongjax.bench.subjects import ours
from loongjax.bench.worker import measure
from loongjax.errors import BenchError

SETTINGS = {
    "model": "random:tiny",
    "dtype": "float32",
    "max_len": 256,
    "instances": 4,
    "pool_slots": 512,
}
PROMPTS = [[5, 6, 7, 8] * 8, [9, 10, 11, 12] * 8, [1, 2, 3] * 10]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_a_degree_confines_the_work_and_changes_no_token(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    said = {}
    for degree in (1, 2):
        subject = ours.load(SETTINGS | {"degree": degree})
        with subject.engine:
            timing = measure(subject, PROMPTS, 4)
            said[degree] = timing["first_tokens"]
            groups = {record.group for record in subject.engine.steps()}
        assert groups == {tuple(range(degree))}
    assert said[1] == said[2]


def test_compiling_while_time_is_taken_is_an_error(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    subject = ours.load(SETTINGS | {"degree": 1})
    with subject.engine:
        measure(subject, PROMPTS, 4)
        subject.warmed()
        measure(subject, PROMPTS, 4)
        with pytest.raises(BenchError, match="1 programs were made while time was taken"):
            measure(subject, [[7] * 200], 1)


def test_a_request_that_is_refused_is_an_error(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    subject = ours.load(SETTINGS | {"degree": 1})
    with subject.engine, pytest.raises(ValueError, match="257"):
        measure(subject, [[7] * 257], 1)
