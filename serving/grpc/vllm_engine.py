"""The service `vllm.grpc.engine.VllmEngine`, which gateways speak to vLLM's own gRPC server.

Thin: messages in, calls of `serving.service.Service`, messages out. Handlers write to their
context themselves, rather than yield: so a cancellation always meets them at an `await`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
import zipfile
from dataclasses import dataclass, field
from datetime import UTC, datetime

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2

from loongjax import __version__
from loongjax.api.prompts import need_tokenizer
from loongjax.engine import FinishedEvent
from loongjax.errors import RequestError
from loongjax.plan import TokenLogprobs
from loongjax.text.export import tokenizer_files
from serving.errors import UnsupportedError, status_of
from serving.grpc.guarding import Context, client, refuse, request_name, request_priority
from serving.grpc.vllm_logprobs import input_logprobs, output_logprobs
from serving.grpc.vllm_request import to_call
from serving.profiling import Profiler
from serving.service import Answers, Service
from serving.stream import Progress

SERVER_TYPE = "loongjax"
_CHUNK_BYTES = 2**20


class VllmEngineServicer(pb_grpc.VllmEngineServicer):
    """See the module, and the messages' own documentation in `vllm_engine.proto`."""

    def __init__(self, service: Service, profiler: Profiler) -> None:
        self._service = service
        self._profiler = profiler

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        call = to_call(
            request,
            name=request_name(request.request_id, context),
            client=client(),
            priority=request_priority(context),
            time_left_s=context.time_remaining(),
        )
        async with self._service.answer(call) as answers:
            if request.stream:
                await self._stream(answers, context)
            else:
                await self._complete(answers, context)

    async def _stream(self, answers: Answers, context: Context) -> None:
        said: dict[int, _Said] = {}
        async for piece in self._service.progress(answers):
            so_far = said.setdefault(piece.sample, _Said())
            so_far.add(piece)
            if piece.token_ids:
                chunk = pb.GenerateStreamChunk(
                    token_ids=piece.token_ids,
                    prompt_tokens=answers.prompt_tokens,
                    completion_tokens=len(so_far.token_ids),
                    index=piece.sample,
                    output_logprobs=output_logprobs(piece.logprobs),
                    input_logprobs=input_logprobs(piece.prompt_logprobs, answers.first_token),
                )
                await context.write(pb.GenerateResponse(chunk=chunk))
            if piece.end is not None:
                await context.write(_complete(answers, piece.sample, so_far, piece.end))

    async def _complete(self, answers: Answers, context: Context) -> None:
        said: dict[int, _Said] = {}
        async for piece in self._service.progress(answers):
            so_far = said.setdefault(piece.sample, _Said())
            so_far.add(piece)
            if piece.end is not None:
                await context.write(_complete(answers, piece.sample, so_far, piece.end))

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        for name in request.request_ids:
            self._service.abort(name, client())
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
        service = self._service
        stats = service.built.engine.stats()
        used = sum(instance.used for instance in stats.instances)
        slots = sum(instance.slots for instance in stats.instances)
        load = pb.SchedulerLoad(
            num_running_reqs=stats.running,
            num_waiting_reqs=stats.waiting + service.gate.waiting,
            num_total_reqs=stats.running + stats.waiting + service.gate.waiting,
            num_used_tokens=used,
            max_total_num_tokens=slots,
            token_usage=used / slots,
            max_running_requests=service.limits.max_requests,
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
        archive = await asyncio.to_thread(self._tokenizer_archive)
        for start in range(0, len(archive), _CHUNK_BYTES):
            chunk = archive[start : start + _CHUNK_BYTES]
            is_last = start + _CHUNK_BYTES >= len(archive)
            await context.write(
                common_pb2.GetTokenizerChunk(
                    data=chunk, sha256=hashlib.sha256(archive).hexdigest() if is_last else ""
                )
            )

    def _tokenizer_archive(self) -> bytes:
        built = self._service.built
        tokenizer = need_tokenizer(built.tokenizer)
        files = tokenizer_files(tokenizer, built.engine.limits.vocab_size)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                # Always the same date, so that the same tokenizer has the same digest.
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: Context
    ) -> common_pb2.ProfileResponse:
        for named, value in request.ListFields():
            raise RequestError(
                f"{named.name} is not supported, and {value} was asked for; a profile begins at "
                "once, goes on until StopProfile, and lies where the server was told to write it"
            )
        folder = await self._profiler.start()
        return common_pb2.ProfileResponse(success=True, message=f"recording to {folder}")

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: Context
    ) -> common_pb2.ProfileResponse:
        folder = await self._profiler.stop()
        return common_pb2.ProfileResponse(success=True, message=f"written to {folder}")


async def _unsupported(context: Context, message: str) -> None:
    await refuse(context, status_of(UnsupportedError(message)))


@dataclass(kw_only=True, slots=True)
class _Said:
    """What came of an answer so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, piece: Progress) -> None:
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.prompt_logprobs += piece.prompt_logprobs


def _complete(
    answers: Answers, sample: int, said: _Said, end: FinishedEvent
) -> pb.GenerateResponse:
    complete = pb.GenerateComplete(
        output_ids=said.token_ids,
        output_logprobs=output_logprobs(said.logprobs),
        input_logprobs=input_logprobs(said.prompt_logprobs, answers.first_token),
        finish_reason=end.reason,
        prompt_tokens=answers.prompt_tokens,
        completion_tokens=len(said.token_ids),
        index=sample,
    )
    if end.stop_token is not None:
        complete.matched_token_id = end.stop_token
    if end.stop_text is not None:
        complete.matched_stop_str = end.stop_text
    return pb.GenerateResponse(complete=complete)
