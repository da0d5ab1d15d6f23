"""Lines answered by an engine of this process."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

from loongjax.api.answers import AnswerBuilder
from loongjax.api.prompts import encode_prompt
from loongjax.engine import Engine, Event, FinishedEvent, GenerationRequest, TokensEvent, sample_id
from loongjax.errors import EngineClosedError
from loongjax.offline.backend import LineFailedError
from loongjax.offline.task import Answer, Prompt
from loongjax.sampling.params import SamplingParams
from loongjax.text import Tokenizer


class EngineBackend:
    """See `Backend`. The engine stays its owner's."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._before = engine.stats().generated_tokens
        self._numbers = itertools.count()

    @property
    def generated_tokens(self) -> int:
        """Tokens since this backend was made."""
        return self._engine.stats().generated_tokens - self._before

    def degrees(self) -> tuple[int, ...]:
        """Of the groups that have a step in flight."""
        return tuple(len(group) for group in {step.group for step in self._engine.in_flight})

    async def answer(self, prompt: Prompt, params: SamplingParams) -> Answer:
        """See `Backend.answer`."""
        token_ids = encode_prompt(prompt, self._tokenizer)
        request = GenerationRequest(
            id=f"offline-{next(self._numbers)}", token_ids=token_ids, params=params
        )
        collected = _Collected(samples=params.n, loop=asyncio.get_running_loop())
        try:
            self._engine.submit_samples(request, on_event=collected.take)
            await collected.ended
        finally:
            if not collected.ended.done() or collected.ended.cancelled():
                collected.is_unwanted = True
                for sample in range(params.n):
                    self._engine.abort(sample_id(request.id, sample))
        builders = [self._build(sample, collected, params) for sample in range(params.n)]
        return Answer(
            prompt_tokens=len(token_ids),
            completions=tuple(
                builder.build(collected.ends[sample], ()) for sample, builder in enumerate(builders)
            ),
            prompt_logprobs=builders[0].prompt_logprobs,
        )

    def _build(self, sample: int, collected: _Collected, params: SamplingParams) -> AnswerBuilder:
        end = collected.ends[sample]
        if end.reason in ("error", "abort"):
            message = end.error or "the engine was closed before the answer had ended"
            lives_on = self._engine.alive and end.reason == "error"
            raise LineFailedError(message) if lives_on else EngineClosedError(message)
        builder = AnswerBuilder(sample, self._tokenizer, params)
        for event in collected.tokens[sample]:
            builder.add(event)
        builder.add(end)
        return builder


@dataclass(kw_only=True)
class _Collected:
    """The events of a request's answers. The engine's thread fills it; a future tells its end."""

    samples: int
    loop: asyncio.AbstractEventLoop
    is_unwanted: bool = False
    tokens: dict[int, list[TokensEvent]] = field(default_factory=dict)
    ends: dict[int, FinishedEvent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = {sample: [] for sample in range(self.samples)}
        self.ended: asyncio.Future[None] = self.loop.create_future()

    def take(self, sample: int, event: Event) -> None:
        if isinstance(event, TokensEvent):
            self.tokens[sample].append(event)
            return
        self.ends[sample] = event
        if len(self.ends) == self.samples and not self.is_unwanted:
            self.loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
