"""`AsyncLLM` over a fake executor: the answers of `LLM`, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from loongjax import AsyncLLM, SamplingParams
from loongjax.errors import EngineClosedError, RequestError
from tests.api.test_llm import FOUR, HELLO, byte_tokenizer
from tests.engine.fake_executor import answer
from tests.engine.rig import Rig, rig


def run(body: Callable[[AsyncLLM, Rig], Coroutine[Any, Any, None]], **options: object) -> None:
    """Runs a test; at its end the engine is closed and its pool must be empty."""

    async def inside(it: Rig) -> None:
        async with AsyncLLM.from_engine(it.engine, byte_tokenizer()) as llm:
            await body(llm, it)

    with rig(**options) as it:
        asyncio.run(inside(it))


def test_answers_are_those_of_llm() -> None:
    async def body(llm: AsyncLLM, it: Rig) -> None:
        prompts = ["hello", [1, 2, 3], []]
        one, three, bad = await llm.generate(prompts, SamplingParams(n=2, max_tokens=4))
        assert [given.token_ids for given in one.outputs] == [answer(HELLO, 4, i) for i in (0, 1)]
        assert three.token_ids == answer((1, 2, 3), 4)
        assert (bad.finish_reason, bad.error is None) == ("error", False)
        (single,) = await llm.generate("hello", FOUR)
        assert single.token_ids == answer(HELLO, 4)
        assert sum(run.count for run in single.steps) == 4
        chat = [{"role": "user", "content": "hi"}]
        assert (await llm.chat(chat, FOUR)).finish_reason == "length"
        assert [given async for given in llm.stream("hello", FOUR)][-1].finish_reason == "length"

    run(body)


def test_a_stream_that_is_left_is_aborted() -> None:
    async def body(llm: AsyncLLM, it: Rig) -> None:
        stream = llm.stream("hello", SamplingParams(max_tokens=100))
        assert (await anext(stream)).token_ids == answer(HELLO, 1)
        await stream.aclose()
        with pytest.raises(RequestError, match="one answer, but n = 2"):
            await anext(llm.stream("hello", SamplingParams(n=2)))

    run(body)


def test_what_is_cancelled_is_aborted() -> None:
    async def body(llm: AsyncLLM, it: Rig) -> None:
        it.executor.hold()
        task = asyncio.create_task(llm.generate(["hello", "world"], FOUR))
        while len(it.executor.inputs) < 2:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        it.executor.release()
        while any(record.reason is None for record in it.engine.requests()):
            await asyncio.sleep(0.001)
        assert {record.reason for record in it.engine.requests()} == {"abort"}

    run(body)


def test_what_is_wrong_is_raised_for_a_prompt_alone() -> None:
    async def body(llm: AsyncLLM, it: Rig) -> None:
        with pytest.raises(RequestError, match="is empty"):
            await llm.generate("", FOUR)
        await llm.aclose()
        with pytest.raises(EngineClosedError):
            await llm.generate("hello", FOUR)

    run(body)
