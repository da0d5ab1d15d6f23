"""`AsyncLLM`: a model served in this process, for asyncio programs.

The twin of `LLM`: the same engine and the same answers. Whatever is cancelled is aborted. Loading
a model blocks, so make it before the loop serves others, or in a thread:
`await asyncio.to_thread(AsyncLLM, "demo")`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import cast

from loongjax.api.answers import AnswerBuilder, refused
from loongjax.api.outputs import CompletionOutput, RequestOutput, RequestOutputs, StreamChunk
from loongjax.api.pending import check_stream
from loongjax.api.prompts import Prompt, encode_prompt, is_single, params_for_each
from loongjax.api.served import ServedModel, new_id
from loongjax.engine import Event, FinishedEvent, GenerationRequest, RequestHandle
from loongjax.errors import EngineClosedError, LoongJaxError, RequestError
from loongjax.sampling.params import SamplingParams


class AsyncLLM(ServedModel):
    """A language model on one or more elastic instances; any number of tasks may use it.

    async with AsyncLLM("demo", instances=4) as llm:
        async for chunk in llm.stream("Once upon a time", SamplingParams(max_tokens=50)):
            print(chunk.text, end="")
    """

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts together; see `LLM.generate`, also for what it raises."""
        if is_single(prompts):
            own = params_for_each(params, 1)[0]
            return RequestOutputs([await self._answer(cast(Prompt, prompts), own)])
        batch = cast(Sequence[Prompt], prompts)
        each = params_for_each(params, len(batch))
        async with asyncio.TaskGroup() as tasks:
            started = [
                tasks.create_task(self._try(prompt, own))
                for prompt, own in zip(batch, each, strict=True)
            ]
        return RequestOutputs(task.result() for task in started)

    async def chat(
        self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """The assistant's next answer in a conversation; see `LLM.chat`."""
        return await self._answer(messages, params or SamplingParams())

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[StreamChunk, None]:
        """The answer to one prompt, piece by piece; see `LLM.stream`.

        Leaving the loop aborts the request when the generator is closed: at once with
        `contextlib.aclosing`, else when asyncio gets to it.
        """
        params = params or SamplingParams()
        check_stream(params)
        token_ids = await self._encode(prompt)
        (builder,) = self._builders(params)
        with self._run(token_ids, params) as answers:
            async for _, event in answers:
                chunk = builder.add(event)
                if builder.end is not None:
                    self._raise_error(builder.end.error)
                yield chunk

    async def aclose(self) -> None:
        """`close`, without blocking the loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _answer(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        output = await self._complete(await self._encode(prompt), params)
        for answer in output.outputs:
            self._raise_error(answer.error)
        return output

    async def _try(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        token_ids: tuple[int, ...] = ()
        try:
            token_ids = await self._encode(prompt)
            return await self._complete(token_ids, params)
        except RequestError as error:
            return refused(token_ids, self.tokenizer, str(error))

    async def _complete(self, token_ids: tuple[int, ...], params: SamplingParams) -> RequestOutput:
        builders = self._builders(params)
        with self._run(token_ids, params) as answers:
            async for sample, event in answers:
                builders[sample].add(event)
        scores = builders[0].prompt_logprobs
        return RequestOutput(
            prompt_token_ids=token_ids,
            outputs=tuple(map(self._build, builders, answers.handles)),
            prompt_logprobs=None if params.prompt_logprobs is None else (None, *scores),
        )

    def _build(self, builder: AnswerBuilder, handle: RequestHandle) -> CompletionOutput:
        assert builder.end is not None
        shared = () if handle.stem is None else self.engine.steps_of(handle.stem)
        return builder.build(builder.end, (*shared, *self.engine.steps_of(handle.id)))

    @contextmanager
    def _run(self, token_ids: tuple[int, ...], params: SamplingParams) -> Iterator[_Answers]:
        """Runs a request for as long as the block lasts; leaving it aborts what has not ended."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def on_event(sample: int, event: Event) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, (sample, event))

        request = GenerationRequest(id=new_id(), token_ids=token_ids, params=params)
        handles = self.engine.submit_samples(request, on_event=on_event)
        try:
            yield _Answers(handles=handles, arrived=arrived)
        finally:
            for handle in handles:
                handle.abort()

    def _builders(self, params: SamplingParams) -> list[AnswerBuilder]:
        return [AnswerBuilder(i, self.tokenizer, params) for i in range(params.n)]

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        return await asyncio.to_thread(encode_prompt, prompt, self.tokenizer)

    def _raise_error(self, error: str | None) -> None:
        if error is not None:
            raise LoongJaxError(error) if self.engine.alive else EngineClosedError(error)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answers:
    """What comes of a request, with the numbers of the answers, until all have ended."""

    handles: tuple[RequestHandle, ...]
    arrived: asyncio.Queue[tuple[int, Event]]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        running = len(self.handles)
        while running:
            sample, event = await self.arrived.get()
            running -= isinstance(event, FinishedEvent)
            yield sample, event
