"""The paths of the HTTP side. Thin: bodies in, calls of `Service`, bodies out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from loongjax import __version__
from loongjax.api.prompts import need_tokenizer
from loongjax.errors import EngineClosedError, RequestError
from loongjax.sampling.params import SamplingParams
from serving import wishes
from serving.auth import Guard
from serving.errors import AbsentError, DrainingError
from serving.http import schemas
from serving.http.choices import ChoicePiece, choices
from serving.http.door import Door, unless_gone
from serving.http.errors import add_handlers
from serving.http.events import EventStream
from serving.http.logprobs import LogprobWriter
from serving.http.wording import Answer, Kind
from serving.metrics import CONTENT_TYPE, Metrics
from serving.service import Call, Service
from serving.text import Chat, Prompt, encode

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorResponse},
    "5XX": {"model": schemas.ErrorResponse},
}


def make_app(service: Service, guard: Guard, metrics: Metrics) -> FastAPI:
    """The ASGI app of a server."""
    app = FastAPI(
        title="loongjax", version=__version__, docs_url=None, redoc_url=None, responses=_ERRORS
    )
    app.add_middleware(Door, guard=guard, max_bytes=service.limits.max_message_bytes)
    add_handlers(app)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_state(app, service, metrics)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    async def answer(
        request: Request,
        body: schemas.CompletionRequest | schemas.ChatRequest,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        kind: Kind,
    ) -> Response:
        _check_model(service, body.model)
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options needs stream: true")
        name = wishes.request_name(request.headers.get("x-request-id"))
        calls = _calls(request, name, prompts, params, body.priority)
        told = Answer(
            id=name,
            kind=kind,
            model=service.model_name,
            writer=LogprobWriter(tokenizer=service.built.tokenizer),
            with_ids=bool(body.return_token_ids),
            with_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        pieces = choices(service, calls)
        if not body.stream:
            found = await unless_gone(request, _all(pieces))
            response: Response = JSONResponse(told.whole(found, params.n))
        else:
            # Until something is said, an error can still be told by a status of its own.
            first = await unless_gone(request, anext(pieces))
            response = EventStream(request, _events(told, first, pieces, params.n))
        response.headers["x-request-id"] = name
        return response

    @app.post(
        "/v1/completions",
        responses={
            200: {"model": schemas.CompletionResponse, "content": {"text/event-stream": {}}}
        },
    )
    async def completions(
        request: Request, body: Annotated[schemas.CompletionRequest, Body()]
    ) -> Response:
        prompts = _prompts(body.prompt)
        return await answer(request, body, prompts, body.sampling(), "text_completion")

    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": schemas.ChatResponse, "content": {"text/event-stream": {}}}},
    )
    async def chat_completions(
        request: Request, body: Annotated[schemas.ChatRequest, Body()]
    ) -> Response:
        chat = Chat(messages=[message.plain() for message in body.messages])
        return await answer(request, body, [chat], body.sampling(), "chat.completion")


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(
        body: Annotated[schemas.TokenizeRequest, Body()],
    ) -> schemas.TokenizeResponse:
        _check_model(service, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give prompt or messages, and not both")
        tokenizer = need_tokenizer(service.built.tokenizer)
        if body.messages is not None:
            chat = Chat(messages=[message.plain() for message in body.messages])
            tokens = list(await encode(chat, tokenizer))
        else:
            tokens = await asyncio.to_thread(
                tokenizer.encode, body.prompt or "", add_special=body.add_special_tokens
            )
        return schemas.TokenizeResponse(
            count=len(tokens),
            max_model_len=service.built.engine.limits.max_model_len,
            tokens=tokens,
        )

    @app.post("/detokenize")
    async def detokenize(
        body: Annotated[schemas.DetokenizeRequest, Body()],
    ) -> schemas.DetokenizeResponse:
        _check_model(service, body.model)
        tokenizer = need_tokenizer(service.built.tokenizer)
        return schemas.DetokenizeResponse(
            prompt=await asyncio.to_thread(tokenizer.decode, body.tokens)
        )


def _add_state(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/v1/models")
    async def models() -> schemas.ModelList:
        card = schemas.ModelCard(
            id=service.model_name,
            created=int(service.started),
            max_model_len=service.built.engine.limits.max_model_len,
        )
        return schemas.ModelList(data=[card])

    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> Response:
        if not service.built.engine.alive:
            raise EngineClosedError("the engine has ended")
        return PlainTextResponse("alive")

    @app.get("/ready", response_class=PlainTextResponse)
    async def ready() -> Response:
        if not service.is_ready:
            raise DrainingError("the server takes no new requests")
        return PlainTextResponse("ready")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _check_model(service: Service, model: str | None) -> None:
    if model is not None and model != service.model_name:
        raise AbsentError(
            f"model {model!r} is not served here; there is {service.model_name!r} alone"
        )


def _calls(
    request: Request,
    name: str,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    priority: int | None,
) -> list[Call]:
    if priority is None:
        priority = wishes.priority(request.headers.get("x-priority"))
    return [
        Call(
            name=name if len(prompts) == 1 else f"{name}/{place}",
            client=request.state.client,
            protocol="http",
            prompt=prompt,
            params=params,
            priority=priority,
        )
        for place, prompt in enumerate(prompts)
    ]


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> Sequence[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


async def _all(pieces: AsyncGenerator[ChoicePiece, None]) -> list[ChoicePiece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _events(
    told: Answer, first: ChoicePiece, rest: AsyncGenerator[ChoicePiece, None], samples: int
) -> AsyncGenerator[bytes, None]:
    async def pieces() -> AsyncGenerator[ChoicePiece, None]:
        yield first
        async for piece in rest:
            yield piece

    async with aclosing(rest), aclosing(pieces()) as all_pieces:
        async for event in told.events(all_pieces, samples):
            yield event
