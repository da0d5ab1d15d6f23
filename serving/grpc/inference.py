"""The service `loongjax.v1.Inference`. Thin: messages in, calls of `Service`, messages out."""

from __future__ import annotations

import asyncio
from typing import get_args

from loongjax.api.prompts import need_tokenizer
from loongjax.engine import FinishedEvent, FinishReason
from loongjax.errors import LoongJaxError, RequestError
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
            texts = AnswerTexts(self._service.built.tokenizer)
            counts: dict[int, int] = {}
            async for piece in self._service.progress(answers):
                counts[piece.sample] = counts.get(piece.sample, 0) + len(piece.token_ids)
                response = pb.GenerateResponse(
                    index=piece.sample, token_ids=piece.token_ids, text=texts.push(piece)
                )
                if piece.end is not None:
                    finish = _finish(answers, piece.end, counts[piece.sample])
                    response.finish.CopyFrom(finish)
                await context.write(response)

    async def GenerateBatch(self, request: pb.GenerateBatchRequest, context: Context) -> None:
        name = request_name("", context)
        batch = _Batch(self._service, context)
        async with asyncio.TaskGroup() as tasks:
            for place, each in enumerate(request.requests):
                own = each.request_id or f"{name}/{place}"
                tasks.create_task(batch.answer(place, each, name=own, client=client()))

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
        self._places = asyncio.Semaphore(service.limits.max_requests)
        self._lock = asyncio.Lock()

    async def answer(
        self, place: int, request: pb.GenerateRequest, *, name: str, client: str
    ) -> None:
        """Answers one of them; what is wrong with it stands in its result."""
        try:
            async with self._places:
                call = to_call(
                    request,
                    name=name,
                    client=client,
                    priority=request.priority or request_priority(self._context),
                    time_left_s=self._context.time_remaining(),
                )
                await self._answer_in_the_end(place, call)
        except LoongJaxError as error:
            reason = f"{status_of(error).grpc.name}: {error}"
            finish = pb.Finish(reason=pb.FINISH_REASON_ERROR, error=reason)
            await self._send(pb.GenerateBatchResponse(request=place, finish=finish))

    async def _answer_in_the_end(self, place: int, call: Call) -> None:
        while True:
            try:
                async with self._service.answer(call) as answers:
                    await self._send_all(place, answers)
                return
            except BusyError as error:
                await asyncio.sleep(error.retry_after_s)

    async def _send_all(self, place: int, answers: Answers) -> None:
        texts = AnswerTexts(self._service.built.tokenizer)
        ids: dict[int, list[int]] = {}
        said: dict[int, list[str]] = {}
        async for piece in self._service.progress(answers):
            ids.setdefault(piece.sample, []).extend(piece.token_ids)
            said.setdefault(piece.sample, []).append(texts.push(piece))
            if piece.end is not None:
                token_ids = ids.pop(piece.sample)
                response = pb.GenerateBatchResponse(
                    request=place,
                    index=piece.sample,
                    token_ids=token_ids,
                    text="".join(said.pop(piece.sample)),
                    finish=_finish(answers, piece.end, len(token_ids)),
                )
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
        params=_params(request.sampling),
        priority=priority,
        time_left_s=time_left_s,
    )


def _params(sampling: pb.SamplingParams) -> SamplingParams:
    given = {
        field: getattr(sampling, field)
        for field in ("temperature", "n", "seed", "max_tokens")
        if sampling.HasField(field)
    }
    return SamplingParams(
        **given,
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
    )


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
    return finish
