"""The progress bar: for terminals, on stderr."""

from __future__ import annotations

import io
import sys

from loongjax.api.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("warm-up") as show:
        show(0, 4, "prefill-d1-t128-r32")
        show(3, 4, "first steps")
        show(4, 4, "")
    shown = terminal.getvalue()
    for text in ("warm-up:", "prefill-d1-t128-r32", "0/4", "3/4", "4/4"):
        assert text in shown


def test_a_file_sees_nothing(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with progress_bar("warm-up") as show:
        show(0, 4, "prefill")
    assert file.getvalue() == ""
