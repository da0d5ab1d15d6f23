"""How errors are told, and what a server may be started with."""

from __future__ import annotations

import pytest
from grpc import StatusCode

from loongjax.errors import CapacityError, ConfigError, EngineClosedError, RequestError, StepError
from serving.config import ServeConfig
from serving.errors import BusyError, DrainingError, UnsupportedError, status_of


@pytest.mark.parametrize(
    ("error", "code", "http"),
    [
        (RequestError("x"), StatusCode.INVALID_ARGUMENT, 400),
        (CapacityError("x"), StatusCode.INVALID_ARGUMENT, 400),
        (UnsupportedError("x"), StatusCode.UNIMPLEMENTED, 501),
        (DrainingError("x"), StatusCode.UNAVAILABLE, 503),
        (EngineClosedError("x"), StatusCode.UNAVAILABLE, 503),
        (StepError("x"), StatusCode.INTERNAL, 500),
    ],
)
def test_codes(error, code, http):
    status = status_of(error)
    assert (status.grpc, status.http, status.message) == (code, http, "x")
    assert status.retry_after_s is None


def test_who_is_busy_says_until_when():
    status = status_of(BusyError("x", retry_after_s=3))
    assert (status.grpc, status.http, status.retry_after_s) == (
        StatusCode.RESOURCE_EXHAUSTED,
        429,
        3,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70_000}, "70000"),
        ({"max_requests": 0}, "max_requests must be at least 1, not 0"),
        ({"grace_s": float("nan")}, "grace_s"),
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"host": "example"}, "IP address"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**fields)


def test_addresses():
    assert ServeConfig(host="::1", port=1).grpc_address == "[::1]:1"
    assert ServeConfig(host="0.0.0.0", port=1, insecure=True).grpc_address == "0.0.0.0:1"
