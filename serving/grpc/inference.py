"""The service `loongjax.v1.Inference`. Thin: messages in, calls of `Service`, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import get_args

from loongjax.api.prompts import need_tokenizer
from loongjax.engine import FinishedEvent, FinishReason
from loongjax.errors import LoongJaxError, RequestError
from loongjax.plan import TokenLogprobs
from loongjax.sampling.params import SamplingParams
from serving.errors import BusyError, status_of
from serving.grpc.guarding import Context, client, request_name, request_priority
from serving.service import Answers, Call, Service
from serving.stubs import inference_pb2 as pb
from serving.stubs import inference_pb2_grpc as pb_grpc
from serving.text import AnswerTexts, Chat, Prompt, encode

_REASONS = {
    name: pb.FinishReason.Value(f"FINISH_REASON_{name.upper()}") for name in get_args(FinishReason)
}

_OPTIONAL = tuple(field.name for field in pb.SamplingParams.DESCRIPTOR.fields if field.has_presence)


class InferenceServicer(pb_grpc.InferenceServicer):
    """See the module, and `protos/loongjax/v1/inference.proto`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        name = request_name(request.request_id, context)
        call = to_call(
            request,
            name=name,
            client=client(),
            priority=request.priority or request_priority(context),
            time_left_s=context.time_remaining(),
        )
        async with self._service.answer(call) as answers:
            texts = AnswerTexts(self._service.built.tokenizer, call.params)
            counts = [0] * call.params.n
            async for piece in self._service.progress(answers):
                counts[piece.sample] += len(piece.token_ids)
                response = pb.GenerateResponse(
                    index=piece.sample, token_ids=piece.token_ids, text=texts.push(piece)
                )
                if piece.logprobs or piece.prompt_logprobs:
                    response.logprobs.extend(_logprobs(piece.logprobs))
                    response.prompt_logprobs.extend(_logprobs(piece.prompt_logprobs))
                if piece.end is not None:
                    finish = _finish(answers, piece.end, counts[piece.sample])
                    response.finish.CopyFrom(finish)
                await context.write(response)

    async def GenerateBatch(self, request: pb.GenerateBatchRequest, context: Context) -> None:
        name = request_name("", context)
        batch = _Batch(self._service, context)
        left = iter(enumerate(request.requests))

        async def work() -> None:
            for place, each in left:
                await batch.answer(place, each, each.request_id or f"{name}/{place}")

        # No more tasks than can have a turn at once, however many requests a message holds.
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(len(request.requests), self._service.limits.max_requests)):
                tasks.create_task(work())

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        prompt, tokenizer = _prompt(request.prompt), need_tokenizer(self._service.built.tokenizer)
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(tokenizer.encode, prompt, add_special=request.add_special)
        else:
            ids = list(await encode(prompt, tokenizer))
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        tokenizer = need_tokenizer(self._service.built.tokenizer)
        text = await asyncio.to_thread(
            tokenizer.decode, request.token_ids, skip_special=not request.keep_special
        )
        return pb.DetokenizeResponse(text=text)


class _Batch:
    """Answers the requests of one batch, and sends each answer when it is whole.

    A batch is in no hurry: where a limit is reached, its requests wait, and are not refused.
    """

    def __init__(self, service: Service, context: Context) -> None:
        self._service = service
        self._context = context
        self._client = client()
        self._lock = asyncio.Lock()

    async def answer(self, place: int, request: pb.GenerateRequest, name: str) -> None:
        """Answers one of them; what is wrong with it stands in its result."""
        try:
            call = to_call(
                request,
                name=name,
                client=self._client,
                priority=request.priority or request_priority(self._context),
                time_left_s=self._context.time_remaining(),
            )
            await self._answer_in_the_end(place, call)
        except LoongJaxError as error:
            status = status_of(error)
            reason = f"{status.grpc.name}: {status.message}"
            finish = pb.Finish(reason=pb.FINISH_REASON_ERROR, error=reason)
            await self._send(pb.GenerateBatchResponse(request=place, finish=finish))

    async def _answer_in_the_end(self, place: int, call: Call) -> None:
        while True:
            try:
                async with self._service.answer(call) as answers:
                    await self._send_all(place, answers, call.params)
                return
            except BusyError as error:
                await asyncio.sleep(error.retry_after_s)

    async def _send_all(self, place: int, answers: Answers, params: SamplingParams) -> None:
        texts = AnswerTexts(self._service.built.tokenizer, params)
        whole = [
            pb.GenerateBatchResponse(request=place, index=sample) for sample in range(params.n)
        ]
        async for piece in self._service.progress(answers):
            response = whole[piece.sample]
            response.token_ids.extend(piece.token_ids)
            response.text += texts.push(piece)
            response.logprobs.extend(_logprobs(piece.logprobs))
            response.prompt_logprobs.extend(_logprobs(piece.prompt_logprobs))
            if piece.end is not None:
                finish = _finish(answers, piece.end, len(response.token_ids))
                response.finish.CopyFrom(finish)
                await self._send(response)

    async def _send(self, response: pb.GenerateBatchResponse) -> None:
        async with self._lock:
            await self._context.write(response)


def to_call(
    request: pb.GenerateRequest,
    *,
    name: str,
    client: str,
    priority: int,
    time_left_s: float | None,
) -> Call:
    """The call that a message describes, in the name of a client.

    Raises:
      RequestError: A value cannot be served; the message names it.
    """
    return Call(
        name=name,
        client=client,
        protocol="grpc",
        prompt=_prompt(request.prompt),
        params=to_params(request.sampling),
        priority=priority,
        time_left_s=time_left_s,
    )


def to_params(sampling: pb.SamplingParams) -> SamplingParams:
    """The parameters that a message describes; raises as `to_call`."""
    given = {field: getattr(sampling, field) for field in _OPTIONAL if sampling.HasField(field)}
    return SamplingParams(
        **given,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=sampling.min_tokens,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        ignore_eos=sampling.ignore_eos,
    )


def _logprobs(logprobs: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            token_id=each.token,
            logprob=each.logprob,
            rank=each.rank,
            top=[pb.TopLogprob(token_id=token, logprob=value) for token, value in each.top],
        )
        for each in logprobs
    ]


def _prompt(prompt: pb.Prompt) -> Prompt:
    match prompt.WhichOneof("kind"):
        case "text":
            return prompt.text
        case "token_ids":
            return tuple(prompt.token_ids.ids)
        case "chat":
            return Chat(
                messages=[
                    {"role": message.role, "content": message.content}
                    for message in prompt.chat.messages
                ]
            )
    raise RequestError("the prompt is empty; give its text, token_ids, or chat")


def _finish(answers: Answers, end: FinishedEvent, tokens: int) -> pb.Finish:
    finish = pb.Finish(
        reason=_REASONS[end.reason],
        error=end.error or "",
        prompt_tokens=answers.prompt_tokens,
        completion_tokens=tokens,
    )
    if end.stop_token is not None:
        finish.stop_token_id = end.stop_token
    if end.stop_text is not None:
        finish.stop_text = end.stop_text
    return finish
