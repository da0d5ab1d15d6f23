"""`LLM`: a model served in this process, for notebooks and scripts.

A thin, blocking face of the engine: text in and out, batches, streams. Several threads may
share one `LLM`; their requests run together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import cast

from loongjax.api.answers import refused
from loongjax.api.outputs import RequestOutput, RequestOutputs, StreamChunk
from loongjax.api.pending import PendingRequest, check_stream
from loongjax.api.progress import progress_bar
from loongjax.api.prompts import Prompt, encode_prompt, is_single, params_for_each
from loongjax.api.served import ServedModel, new_id
from loongjax.engine import sample_id
from loongjax.errors import RequestError
from loongjax.plan import RequestId
from loongjax.sampling.params import SamplingParams


class LLM(ServedModel):
    """A language model on one or more elastic instances.

    with LLM("demo", instances=4) as llm:
        for chunk in llm.stream("Once upon a time", SamplingParams(max_tokens=50)):
            print(chunk.text, end="")
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers prompts together; blocks until all have ended.

        A list of prompts loses no answer to a bad neighbour: what is wrong with one of them,
        before or while it runs, stands in its output (`finish_reason="error"`, `error`). A
        prompt given alone, not in a list, raises instead. An interrupt (Ctrl-C) aborts the
        requests of this call and leaves the engine usable.

        Args:
          prompts: A text, a list of token ids, or a chat (mappings with `role` and `content`,
            oldest first); or a list of those.
          params: For all prompts, or a list with one for each. None: `SamplingParams()`.
          progress: Show a progress bar on stderr, if that is a terminal.

        Returns:
          One output for each prompt, in their order; one for a prompt given alone. Each has
          `n` answers (`RequestOutput.outputs`).

        Raises:
          RequestError: A prompt given alone cannot be served, or `params` are too few or many.
          EngineClosedError: The engine was closed, or died before all were submitted.
          LoongJaxError: A prompt given alone failed while it ran.
        """
        if is_single(prompts):
            return RequestOutputs(
                [self._answer(cast(Prompt, prompts), params_for_each(params, 1)[0])]
            )
        batch = cast(Sequence[Prompt], prompts)
        each = params_for_each(params, len(batch))
        names = [new_id() for _ in batch]
        try:
            jobs = [
                self._start(name, prompt, own)
                for name, prompt, own in zip(names, batch, each, strict=True)
            ]
            return self._collect(jobs, progress=progress)
        finally:
            for name, own in zip(names, each, strict=True):
                self._abort(name, own)

    def chat(
        self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """The assistant's next answer in a conversation.

        Args:
          messages: Mappings with `role` and `content`, oldest first.
          params: None: `SamplingParams()`.

        Raises:
          RequestError: No tokenizer or chat template, or the chat is not acceptable.
          EngineClosedError, LoongJaxError: As `generate` for a prompt given alone.
        """
        return self._answer(messages, params or SamplingParams())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """The answer to one prompt, piece by piece.

        The request starts with the first `next`. Leaving the loop, or closing the iterator,
        aborts it.

        Raises:
          RequestError: As `generate` for a prompt alone; or `n` asks for several answers.
          EngineClosedError, LoongJaxError: As `generate` for a prompt alone.
        """
        params = params or SamplingParams()
        check_stream(params)
        token_ids, name = encode_prompt(prompt, self.tokenizer), new_id()
        try:
            yield from self._submit(name, token_ids, params).stream()
        finally:
            self._abort(name, params)

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> PendingRequest:
        """Starts to answer one prompt and returns at once.

        Args:
          prompt: As for `generate`.
          params: None: `SamplingParams()`.
          priority: Higher is served earlier, by policies that look at it.

        Raises:
          RequestError, EngineClosedError: As `generate` for a prompt given alone.
        """
        token_ids = encode_prompt(prompt, self.tokenizer)
        return self._submit(new_id(), token_ids, params or SamplingParams(), priority)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(
        self, name: RequestId, token_ids: tuple[int, ...], params: SamplingParams, priority: int = 0
    ) -> PendingRequest:
        return PendingRequest(self.engine, self.tokenizer, name, token_ids, params, priority)

    def _abort(self, name: RequestId, params: SamplingParams) -> None:
        """By name: an interrupt may come before anybody has the request."""
        for i in range(params.n):
            self.engine.abort(sample_id(name, i))

    def _start(
        self, name: RequestId, prompt: Prompt, params: SamplingParams
    ) -> PendingRequest | RequestOutput:
        token_ids: tuple[int, ...] = ()
        try:
            token_ids = encode_prompt(prompt, self.tokenizer)
            return self._submit(name, token_ids, params)
        except RequestError as error:
            return refused(token_ids, self.tokenizer, str(error))

    def _answer(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        token_ids, name = encode_prompt(prompt, self.tokenizer), new_id()
        try:
            request = self._submit(name, token_ids, params)
            output = request.result()
        finally:
            self._abort(name, params)
        for completion in output.outputs:
            request.raise_error(completion.error)
        return output

    def _collect(
        self, jobs: Sequence[PendingRequest | RequestOutput], *, progress: bool
    ) -> list[RequestOutput]:
        with progress_bar("generate", "prompt", shown=progress) as tell:
            outputs, tokens, started = RequestOutputs(), 0, time.monotonic()
            for job in jobs:
                output = job.result() if isinstance(job, PendingRequest) else job
                outputs.append(output)
                tokens += sum(len(answer.token_ids) for answer in output.outputs)
                rate = tokens / max(time.monotonic() - started, 1e-9)
                tell(len(outputs), len(jobs), f"{rate:,.0f} tokens/s")
        return outputs
