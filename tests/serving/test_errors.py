"""How errors are told, and what a server may be started with."""

from __future__ import annotations

import pytest
from grpc import StatusCode

from loongjax.errors import CapacityError, ConfigError, EngineClosedError, RequestError, StepError
from serving.config import Limits, ServeConfig, TlsConfig
from serving.errors import (
    AbsentError,
    BusyError,
    DrainingError,
    ForbiddenError,
    OversizedError,
    UnknownClientError,
    UnsupportedError,
    brief,
    status_of,
)


@pytest.mark.parametrize(
    ("error", "code", "http"),
    [
        (RequestError("x"), StatusCode.INVALID_ARGUMENT, 400),
        (CapacityError("x"), StatusCode.INVALID_ARGUMENT, 400),
        (UnsupportedError("x"), StatusCode.UNIMPLEMENTED, 501),
        (UnknownClientError("x"), StatusCode.UNAUTHENTICATED, 401),
        (ForbiddenError("x"), StatusCode.PERMISSION_DENIED, 403),
        (AbsentError("x"), StatusCode.NOT_FOUND, 404),
        (OversizedError("x"), StatusCode.RESOURCE_EXHAUSTED, 413),
        (DrainingError("x"), StatusCode.UNAVAILABLE, 503),
        (EngineClosedError("x"), StatusCode.UNAVAILABLE, 503),
        (StepError("x"), StatusCode.INTERNAL, 500),
    ],
)
def test_codes(error, code, http):
    status = status_of(error)
    assert (status.grpc, status.http, status.message) == (code, http, "x")
    assert status.retry_after_s is None


def test_a_long_value_is_told_in_brief():
    message = f"model {'x' * 10_000!r} is not served here"
    told = status_of(AbsentError(message)).message
    assert len(told) <= 600
    assert told.startswith("model 'xx")
    assert told.endswith("xx' is not served here")
    assert brief("y" * 600) == "y" * 600


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
        ({"http_port": -1}, "http_port must be in"),
        ({"grace_s": float("nan")}, "grace_s"),
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"host": "example"}, "IP address"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_requests": 0}, "max_requests must be at least 1, not 0"),
        ({"max_queue": -1}, "max_queue must not be negative, got -1"),
        ({"max_client_requests": 0}, "max_client_requests must be at least 1"),
        ({"max_message_mib": 4096}, "max_message_mib must be at most 2047, not 4096"),
    ],
)
def test_bad_limits(fields, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**fields)


def test_tls_files_must_exist(tmp_path):
    with pytest.raises(ConfigError, match="tls cert: there is no file"):
        TlsConfig(cert=tmp_path / "cert.pem", key=tmp_path / "key.pem")


def test_an_open_address_needs_to_ask_who_calls(tmp_path):
    assert ServeConfig(host="0.0.0.0", token_file=tmp_path / "tokens").host == "0.0.0.0"


def test_addresses():
    assert ServeConfig(host="::1", port=1).grpc_address == "[::1]:1"
    assert ServeConfig(host="0.0.0.0", port=1, insecure=True).grpc_address == "0.0.0.0:1"
