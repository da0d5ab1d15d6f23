"""Every call of our services: who calls, and how errors are told. No handler can be forgotten.

Health and reflection are for everybody: they say nothing about requests.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from loongjax.errors import LoongJaxError, RequestError
from serving import wishes
from serving.auth import Guard, Scope
from serving.errors import Status, status_of

Context: TypeAlias = grpc.aio.ServicerContext
_Handler: TypeAlias = Callable[[Any, Context], Awaitable[Any]]

_SCOPES = {
    "/vllm.grpc.engine.VllmEngine/": Scope.INFERENCE,
    "/loongjax.v1.Inference/": Scope.INFERENCE,
    "/loongjax.v1.Cluster/": Scope.CLUSTER,
}
_STEERING = frozenset(
    f"/vllm.grpc.engine.VllmEngine/{name}" for name in ("StartProfile", "StopProfile")
)

_client: ContextVar[str] = ContextVar("client")
_log = logging.getLogger(__name__)


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Lets nobody through whom the guard does not know, and tells errors."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The handler of a call, guarded if it is ours."""
        handler = await continuation(handler_call_details)
        scope = _scope(handler_call_details.method)
        if handler is None or scope is None:
            return handler
        if handler.response_streaming:
            make, inner = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, inner = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        return make(
            self._guarded(inner, scope, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, inner: _Handler, scope: Scope, parse: Callable[[bytes], Any]) -> _Handler:
        async def call(data: bytes, context: Context) -> Any:
            async with _told(context):
                authorization = metadata(context).get("authorization")
                _client.set(self._guard.admit(scope, authorization, _peer(context)))
                return await inner(_parsed(parse, data), context)

        return call


def client() -> str:
    """Who calls, inside a handler."""
    return _client.get()


def metadata(context: Context) -> dict[str, str]:
    """What the client sent beside its message; of repeated keys the last."""
    return dict(context.invocation_metadata() or ())


def request_name(asked: str, context: Context) -> str:
    """A request's name: the message's, the metadata's, or one of ours; the client is told.

    Raises:
      RequestError: It is too long.
    """
    name = wishes.request_name(asked or metadata(context).get("x-request-id"))
    # It may hold what metadata must not; the binary form takes anything.
    context.set_trailing_metadata((("x-request-id-bin", name.encode("utf-8", "replace")),))
    return name


def request_priority(context: Context) -> int:
    """The priority in the metadata, or 0.

    Raises:
      RequestError: It is not a number.
    """
    return wishes.priority(metadata(context).get("x-priority"))


async def refuse(context: Context, status: Status) -> None:
    """Ends a call with an error: code, message, and when to try again."""
    trailer: tuple[tuple[str, str], ...] = ()
    if status.retry_after_s is not None:
        trailer = (("retry-after", str(status.retry_after_s)),)
    await context.abort(status.grpc, status.message, trailer)


@asynccontextmanager
async def _told(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except LoongJaxError as error:
        await refuse(context, status_of(error))
    except Exception:
        _log.exception("a call failed")
        await context.abort(
            grpc.StatusCode.INTERNAL, "the server failed at this call; its log says how"
        )


def _parsed(parse: Callable[[bytes], Any], data: bytes) -> Any:
    """The message; grpc itself would call one that cannot be read a failure of the server."""
    try:
        return parse(data)
    except DecodeError as error:
        raise RequestError(f"the message of {len(data)} bytes cannot be read: {error}") from None


def _scope(method: str) -> Scope | None:
    if method in _STEERING:
        return Scope.CLUSTER
    return next((scope for head, scope in _SCOPES.items() if method.startswith(head)), None)


def _peer(context: Context) -> str:
    """The name in the client's certificate, or its address without the port."""
    names = context.auth_context().get("x509_common_name")
    if names:
        return names[0].decode("utf-8", "replace")
    kind, _, address = unquote(context.peer()).partition(":")
    return address.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else kind
