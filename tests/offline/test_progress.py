"""What people see of a job."""

from __future__ import annotations

import logging
import sys

from loongjax.offline import progress
from loongjax.offline.progress import Status, job_progress


def test_the_log_tells_how_far_it_is(monkeypatch, caplog):
    clock = iter([100.0, 100.0, 105.0, 110.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), job_progress(100, 20) as shown:
        shown.show(Status(done=25, errors=0, generated_tokens=50, degrees=()))
        shown.show(Status(done=40, errors=2, generated_tokens=300, degrees=(1, 4, 1)))
    (line,) = [record.message for record in caplog.records]
    assert line == "40 of 100 lines, 30 tokens/s, degrees 4 1x2, 2 errors, 30 s left"


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with job_progress(10, 2) as shown:
        shown.show(Status(done=5, errors=0, generated_tokens=7, degrees=(2,)))
    said = capsys.readouterr().err
    assert "5/10" in said
    assert "degrees 2" in said
