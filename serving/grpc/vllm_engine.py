"""The service `vllm.grpc.engine.VllmEngine`, which gateways speak to vLLM's own gRPC server.

Thin: messages in, calls of `serving.service.Service`, messages out. Handlers write to their
context themselves, rather than yield: so a cancellation always meets them at an `await`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TypeAlias
from uuid import uuid4

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2

from loongjax import __version__
from loongjax.engine import FinishedEvent
from loongjax.errors import LoongJaxError, RequestError
from serving.errors import UnsupportedError, status_of
from serving.grpc.vllm_request import to_call
from serving.service import Answers, Call, Service

SERVER_TYPE = "loongjax"
Context: TypeAlias = grpc.aio.ServicerContext
_log = logging.getLogger(__name__)


class VllmEngineServicer(pb_grpc.VllmEngineServicer):
    """See the module, and the messages' own documentation in `vllm_engine.proto`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        async with told(context):
            call = _call(request, context)
            async with self._service.answer(call) as answers:
                if request.stream:
                    await self._stream(answers, context)
                else:
                    await self._complete(answers, context)

    async def _stream(self, answers: Answers, context: Context) -> None:
        said: dict[int, list[int]] = {}
        async for piece in self._service.progress(answers):
            ids = said.setdefault(piece.sample, [])
            ids += piece.token_ids
            if piece.token_ids:
                chunk = pb.GenerateStreamChunk(
                    token_ids=piece.token_ids,
                    prompt_tokens=answers.prompt_tokens,
                    completion_tokens=len(ids),
                    index=piece.sample,
                )
                await context.write(pb.GenerateResponse(chunk=chunk))
            if piece.end is not None:
                await context.write(_complete(answers, piece.sample, ids, piece.end))

    async def _complete(self, answers: Answers, context: Context) -> None:
        said: dict[int, list[int]] = {}
        async for piece in self._service.progress(answers):
            ids = said.setdefault(piece.sample, [])
            ids += piece.token_ids
            if piece.end is not None:
                await context.write(_complete(answers, piece.sample, ids, piece.end))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        for name in request.request_ids:
            self._service.abort(name)
        return pb.AbortResponse()

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        service = self._service
        message = "serving"
        if not service.built.engine.alive:
            message = "the engine has ended"
        elif service.is_draining:
            message = "draining"
        return pb.HealthCheckResponse(healthy=service.is_ready, message=message)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        built = self._service.built
        limits = built.engine.limits
        return pb.GetModelInfoResponse(
            model_path=self._service.model_name,
            served_model_name=self._service.model_name,
            is_generation=True,
            max_context_length=limits.max_model_len,
            max_req_input_len=limits.max_model_len - 1,
            vocab_size=limits.vocab_size,
            model_type=built.model.family,
            eos_token_ids=sorted(
                {*built.model.eos_ids, *(built.tokenizer.eos_ids if built.tokenizer else ())}
            ),
            bos_token_id=built.model.bos_id,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        service = self._service
        return pb.GetServerInfoResponse(
            active_requests=service.open_requests,
            is_paused=service.is_draining,
            last_receive_timestamp=service.last_call,
            uptime_seconds=time.time() - service.started,
            server_type=SERVER_TYPE,
            data_parallel_size=1,
            block_size=service.built.engine.limits.block_size,
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        stats = self._service.built.engine.stats()
        used = sum(instance.used for instance in stats.instances)
        slots = sum(instance.slots for instance in stats.instances)
        load = pb.SchedulerLoad(
            num_running_reqs=stats.running,
            num_waiting_reqs=stats.waiting,
            num_total_reqs=stats.running + stats.waiting,
            num_used_tokens=used,
            max_total_num_tokens=slots,
            token_usage=used / slots,
            max_running_requests=self._service.max_requests,
        )
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=f"{SERVER_TYPE} {__version__}",
            dp_rank_count=1,
            loads=[load],
        )

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: Context
    ) -> common_pb2.FlushCacheResponse:
        return common_pb2.FlushCacheResponse(
            success=True, message="nothing is kept between requests"
        )

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> None:
        await _unsupported(context, "Embed: this server generates, and makes no embeddings")

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: Context
    ) -> None:
        await _unsupported(context, "SubscribeKvEvents: no KV is kept between requests")

    async def GetTokenizer(self, request: common_pb2.GetTokenizerRequest, context: Context) -> None:
        await _unsupported(context, "GetTokenizer: give the gateway the model's tokenizer itself")

    async def StartProfile(self, request: common_pb2.StartProfileRequest, context: Context) -> None:
        await _unsupported(context, "StartProfile: this server does not record profiles")

    async def StopProfile(self, request: common_pb2.StopProfileRequest, context: Context) -> None:
        await _unsupported(context, "StopProfile: this server does not record profiles")


@asynccontextmanager
async def told(context: Context) -> AsyncIterator[None]:
    """Tells the client of an error inside: status, message, and when to try again."""
    try:
        yield
    except LoongJaxError as error:
        status = status_of(error)
        trailer: tuple[tuple[str, str], ...] = ()
        if status.retry_after_s is not None:
            trailer = (("retry-after", str(status.retry_after_s)),)
        if status.grpc is grpc.StatusCode.INTERNAL:
            _log.error("a request failed: %s", error)
        await context.abort(status.grpc, status.message, trailer)


async def _unsupported(context: Context, message: str) -> None:
    status = status_of(UnsupportedError(message))
    await context.abort(status.grpc, status.message)


def _call(request: pb.GenerateRequest, context: Context) -> Call:
    metadata = dict(context.invocation_metadata() or ())
    priority = metadata.get("x-priority", "0")
    try:
        rank = int(priority)
    except ValueError:
        raise RequestError(
            f"metadata x-priority must be a whole number, not {priority!r}"
        ) from None
    return to_call(
        request,
        name=metadata.get("x-request-id") or uuid4().hex,
        priority=rank,
        time_left_s=context.time_remaining(),
    )


def _complete(
    answers: Answers, sample: int, ids: list[int], end: FinishedEvent
) -> pb.GenerateResponse:
    complete = pb.GenerateComplete(
        output_ids=ids,
        finish_reason=end.reason,
        prompt_tokens=answers.prompt_tokens,
        completion_tokens=len(ids),
        index=sample,
    )
    if end.stop_token is not None:
        complete.matched_token_id = end.stop_token
    return pb.GenerateResponse(complete=complete)
