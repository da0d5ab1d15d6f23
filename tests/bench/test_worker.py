"""The stopwatch, and the processes that it runs in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loongjax.bench import process
from loongjax.bench.process import Worker
from loongjax.bench.worker import measure
from loongjax.errors import BenchError

SUBJECT = """
import os, time
class Echo:
    def generate(self, prompts, tokens):
        print("chatter on stdout")
        for step in range(tokens):
            yield [(i, prompt[0] + step) for i, prompt in enumerate(prompts)]
            if prompts[0] == [666]:
                os._exit(3)
            if prompts[0] == [13]:
                raise ValueError("unlucky")
    def warmed(self):
        pass
def load(settings):
    if settings.get("broken"):
        raise RuntimeError("cannot load")
    return Echo()
"""


class Script:
    """Yields what it was given, whatever is asked."""

    def __init__(self, *came):
        self._came = came

    def generate(self, prompts, tokens):
        yield from self._came

    def warmed(self):
        pass


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_SUBJECTS", tmp_path)
    (tmp_path / "echo.py").write_text(SUBJECT)

    def start(**settings: object) -> Worker:
        return Worker("echo", python=Path(sys.executable), subject="echo", settings=settings)

    return start


def test_the_window_opens_with_the_last_first_token_and_closes_with_the_first_end():
    subject = Script(
        [(0, 7)],
        [(0, 8), (1, 9)],  # opens: 3 tokens so far
        [(0, 1), (1, 1)],
        [(0, 1), (1, 1)],  # closes: 7
        [(1, 1)],
    )
    found = measure(subject, [[1], [2]], 4)
    assert found["window_tokens"] == 4
    assert found["first_tokens"] == [7, 9]
    assert found["first_s"] > 0
    assert found["window_s"] > 0


def test_a_prefill_has_no_window():
    found = measure(Script([(0, 5)]), [[1, 2, 3]], 1)
    assert found["window_tokens"] == 0
    assert found["window_s"] == 0


def test_missing_tokens_are_an_error():
    with pytest.raises(ValueError, match=r"2 tokens were asked for each prompt, \[2, 1\] came"):
        measure(Script([(0, 1), (1, 1)], [(0, 2)]), [[1], [2]], 2)


def test_a_window_that_never_opened_is_an_error():
    came = ([(0, 1)], [(0, 2)], [(1, 1)], [(1, 2)])
    with pytest.raises(ValueError, match="before the last one began: give more tokens"):
        measure(Script(*came), [[1], [2]], 2)


def test_a_process_answers_jobs_whatever_its_libraries_print(start):
    with start() as worker:
        worker.ready()
        timing = worker.measure([[10], [20]], 3)
        worker.warmed()
        assert timing.first_tokens == (10, 20)
        assert timing.window_tokens == 4


def test_a_failed_job_tells_why_and_the_next_one_runs(start):
    with start() as worker:
        worker.ready()
        with pytest.raises(BenchError, match="echo: ValueError: unlucky"):
            worker.measure([[13]], 3)
        assert worker.measure([[1]], 1).first_tokens == (1,)


def test_a_process_that_dies_is_an_error_with_its_last_words(start):
    with start() as worker:
        worker.ready()
        with pytest.raises(BenchError, match=r"echo: it ended[\s\S]*chatter on stdout"):
            worker.measure([[666]], 3)
        with pytest.raises(BenchError, match="it ended"):
            worker.measure([[1]], 1)


def test_a_subject_that_does_not_load_is_an_error(start):
    with start(broken=True) as worker, pytest.raises(BenchError, match="cannot load"):
        worker.ready()


def test_an_interpreter_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(BenchError, match="echo: cannot start"):
        Worker("echo", python=tmp_path / "python", subject="echo", settings={})
