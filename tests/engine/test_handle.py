"""A handle gives every event once, and its end to whoever asks."""

from __future__ import annotations

import logging

import pytest

from loongjax.engine import FinishedEvent, RequestHandle, Timings, TokensEvent
from loongjax.errors import RequestError

END = FinishedEvent(
    reason="stop",
    stop_token=7,
    timings=Timings(arrival=0.0, first_scheduled=1.0, first_token=2.0, end=3.0),
)
TOKENS = TokensEvent(token_ids=(5, 7), stopped=True)


def test_iteration_ends_with_the_end() -> None:
    handle = RequestHandle("a", lambda handle: None)
    handle.deliver(TOKENS)
    handle.deliver(END)
    assert list(handle) == [TOKENS, END]
    assert list(handle) == [END]  # and nobody hangs who comes later
    assert handle.get() is END


def test_get_says_that_the_request_goes_on() -> None:
    handle = RequestHandle("a", lambda handle: None)
    with pytest.raises(TimeoutError, match=r"'a' had no event within 0\.0 s; it goes on"):
        handle.get(timeout=0.0)


def test_callback_gets_the_events_and_get_refuses() -> None:
    seen: list[object] = []
    handle = RequestHandle("a", lambda handle: None, seen.append)
    handle.deliver(TOKENS)
    assert seen == [TOKENS]
    with pytest.raises(RequestError, match="on_event"):
        handle.get(timeout=0.0)


def test_callback_that_raises_aborts_its_request(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[object] = []
    aborted: list[RequestHandle] = []

    def on_event(event: object) -> None:
        calls.append(event)
        raise OSError("the client is gone")

    handle = RequestHandle("a", aborted.append, on_event)
    with caplog.at_level(logging.ERROR):
        handle.deliver(TOKENS)
        handle.deliver(END)
    assert aborted == [handle]
    assert calls == [TOKENS]
    assert "the client is gone" in caplog.text
