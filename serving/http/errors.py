"""How errors are told over HTTP: OpenAI's body, our codes, and the field at fault."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from loongjax.errors import LoongJaxError
from serving.errors import Status, brief, status_of

_BAD_REQUEST = 400


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads what would be answered."""


def add_handlers(app: FastAPI) -> None:
    """Lets an app tell every error in this way."""
    app.add_exception_handler(LoongJaxError, _of_ours)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(ClientGoneError, _to_nobody)
    app.add_exception_handler(Exception, _of_nobody_knows)


def error_body(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = "invalid_request_error" if code == "invalid_argument" else code
    field = None if param is None else brief(param)
    return {"error": {"message": brief(message), "type": kind, "param": field, "code": code}}


def error_response(status: Status) -> JSONResponse:
    """The response for an error."""
    headers = {} if status.retry_after_s is None else {"retry-after": str(status.retry_after_s)}
    if status.http == 401:
        headers["www-authenticate"] = "Bearer"
    body = error_body(status.message, status.grpc.name.lower())
    return JSONResponse(body, status.http, headers)


def _of_ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LoongJaxError)
    return error_response(status_of(error))


def _of_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    param, message = explain(error.errors())
    return JSONResponse(error_body(message, "invalid_argument", param), _BAD_REQUEST)


def _of_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    names = {404: "not_found", 405: "method_not_allowed", 413: "resource_exhausted"}
    code = names.get(error.status_code, "invalid_argument")
    body = error_body(str(error.detail), code)
    return JSONResponse(body, error.status_code, error.headers)


def _to_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # as nginx counts them


def _of_nobody_knows(request: Request, error: Exception) -> JSONResponse:
    """The server logs the error itself, with its traceback."""
    message = "the server failed at this request; its log says how"
    return JSONResponse(error_body(message, "internal"), 500)


def explain(errors: Sequence[Any]) -> tuple[str | None, str]:
    """The field at fault, if it is one, and the message, for what pydantic found wrong."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    field = where[0] if where else None
    if first["type"] == "json_invalid" or field is None:
        return None, (
            f"the body is not what this path takes: {first['msg']}; send a JSON object, with "
            "content-type: application/json"
        )
    if first["type"] == "extra_forbidden":
        return field, f"{'.'.join(where)} is not supported; leave it out"
    if first["type"] == "missing":
        return field, f"{'.'.join(where)} is missing"
    return field, f"{'.'.join(where)}: {first['msg']}; this value is not supported"
