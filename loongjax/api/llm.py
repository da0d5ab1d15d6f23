"""`LLM`: a model served in this process, for notebooks and scripts.

A thin, blocking face of the engine: text in and out, batches, streams. Several threads may
share one `LLM`; their requests run together.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

from loongjax.api.outputs import (
    CompletionOutput,
    RequestOutput,
    StreamChunk,
    decode_rate,
    step_runs,
    ttft_s,
)
from loongjax.api.prompts import (
    Prompt,
    encode_prompt,
    is_single,
    need_tokenizer,
    params_for_each,
)
from loongjax.config import Dtype, engine_config
from loongjax.engine import (
    Engine,
    EngineStats,
    GenerationRequest,
    RequestHandle,
    StepRecord,
    TokensEvent,
    sample_id,
)
from loongjax.errors import EngineClosedError, LoongJaxError, RequestError
from loongjax.plan import RequestId
from loongjax.sampling.params import SamplingParams
from loongjax.text import IncrementalDetokenizer, Tokenizer
from loongjax.timeline import Timeline
from pallas_kernels.backend_names import Backend


class LLM:
    """A language model on one or more elastic instances.

        with LLM("demo", instances=4) as llm:
            for chunk in llm.stream("Once upon a time", SamplingParams(max_tokens=50)):
                print(chunk.text, end="")

    Attributes:
      engine: The engine that serves it.
      tokenizer: Its tokenizer, or None.
    """

    engine: Engine
    tokenizer: Tokenizer | None

    def __init__(
        self,
        model: str | Path,
        *,
        instances: int = 1,
        tensor_parallel: int = 1,
        degrees: Sequence[int] | None = None,
        block_size: int = 16,
        pool_slots: int | None = None,
        max_model_len: int | None = None,
        max_chunk_tokens: int = 2048,
        policy: str = "first_come",
        cost_model: str | Path | None = None,
        dtype: Dtype | None = None,
        attention_backend: Backend | None = None,
        program_dir: str | Path | None = None,
        trust_library: str | Path | None = None,
        warm_up: bool = False,
    ) -> None:
        """Loads a model and starts to serve it; may take minutes the first time.

        Args:
          model: `demo`, a folder, a `.gguf` file, or an id on the Hugging Face hub.
          instances: Elastic instances; each holds all weights and a share of the KV pool.
          tensor_parallel: Devices per instance.
          degrees: How many instances may work together; None: any number with a group (on
            emulated devices: powers of two, and `instances`).
          block_size: KV tokens per block.
          pool_slots: KV tokens per instance; None: what memory allows.
          max_model_len: Tokens of prompt and answer together; None: as many as the model and
            the pool allow.
          max_chunk_tokens: Prompt tokens that an instance computes in one step at most.
          policy: Who plans, such as `loongserve`; settings after a colon
            (`loongjax.scheduler.policies`).
          cost_model: File with the times of steps here, which all policies but `first_come`
            need; `loongjax profile` makes it.
          dtype: `float32` or `bfloat16`; None: float32 on CPU, bfloat16 elsewhere.
          attention_backend: Which kernels run; None: the platform's own.
          program_dir: Folder of compiled programs; None: a folder of this user.
          trust_library: A folder of programs compiled elsewhere, to be read too, whoever owns
            it: whoever can write there can run code here.
          warm_up: Make all programs now, so that no request waits for a compilation; with a
            progress bar if stderr is a terminal.
            `loongjax.config` says what each of these costs.

        Raises:
          ConfigError, ModelError, BackendStartedError, StepError: See `loongjax.errors`.
        """
        from loongjax.api.build import build_engine

        config = engine_config(
            instances=instances,
            tensor_parallel=tensor_parallel,
            degrees=degrees,
            block_size=block_size,
            pool_slots=pool_slots,
            max_model_len=max_model_len,
            max_chunk_tokens=max_chunk_tokens,
            policy=policy,
            cost_model=cost_model,
            dtype=dtype,
            attention_backend=attention_backend,
            program_dir=program_dir,
            trust_library=trust_library,
            warm_up=warm_up,
        )
        built = build_engine(str(model), config)
        self._own(built.engine, built.tokenizer)

    @classmethod
    def from_engine(cls, engine: Engine, tokenizer: Tokenizer | None = None) -> LLM:
        """An `LLM` over an engine that runs already, and which it closes from now on."""
        llm = cls.__new__(cls)
        llm._own(engine, tokenizer)
        return llm

    def _own(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        # A notebook cell that is run again drops its old LLM without closing it.
        weakref.finalize(self, _close_in_background, engine).atexit = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts together; blocks until all have ended.

        A list of prompts loses no answer to a bad neighbour: what is wrong with one of them,
        before or while it runs, stands in its output (`finish_reason="error"`, `error`). A
        prompt given alone, not in a list, raises instead. An interrupt (Ctrl-C) aborts the
        requests of this call and leaves the engine usable.

        Args:
          prompts: A text or a list of token ids, or a list of those.
          params: For all prompts, or a list with one for each. None: `SamplingParams()`.

        Returns:
          One output for each prompt, in their order; one for a prompt given alone. Each has
          `n` answers (`RequestOutput.outputs`).

        Raises:
          RequestError: A prompt given alone cannot be served, or `params` are too few or many.
          EngineClosedError: The engine was closed, or died before all were submitted.
          LoongJaxError: A prompt given alone failed while it ran.
        """
        if is_single(prompts):
            only = encode_prompt(cast(Prompt, prompts), self.tokenizer)
            return [self._answer(only, params_for_each(params, 1)[0])]
        batch = cast(Sequence[Prompt], prompts)
        each = params_for_each(params, len(batch))
        names = [_new_id() for _ in batch]
        try:
            jobs = [
                self._start(name, prompt, own)
                for name, prompt, own in zip(names, batch, each, strict=True)
            ]
            return [self._collect(job) for job in jobs]
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
        token_ids = need_tokenizer(self.tokenizer).encode_chat(messages)
        return self._answer(tuple(token_ids), params or SamplingParams())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamChunk]:
        """The answer to one prompt, piece by piece; for a chat, give
        `llm.tokenizer.encode_chat(messages)`.

        The request starts with the first `next`. Leaving the loop, or closing the iterator,
        aborts it.

        Raises:
          RequestError: As `generate` for a prompt alone; or `n` asks for several answers.
          EngineClosedError, LoongJaxError: As `generate` for a prompt alone.
        """
        if params is not None and params.n > 1:
            raise RequestError(
                f"a stream is one answer, but n = {params.n}; open n streams with seeds of their "
                "own, or call generate"
            )
        token_ids = encode_prompt(prompt, self.tokenizer)
        text = None if self.tokenizer is None else IncrementalDetokenizer(self.tokenizer)
        name = _new_id()
        try:
            request = GenerationRequest(
                id=name, token_ids=token_ids, params=params or SamplingParams()
            )
            for event in self.engine.submit(request):
                if isinstance(event, TokensEvent):
                    piece = None if text is None else text.push(event.text_ids)
                    yield StreamChunk(text=piece, token_ids=event.token_ids)
                else:
                    self._raise_error(event.error)
                    rest = None if text is None else text.flush()
                    yield StreamChunk(text=rest, token_ids=(), finish_reason=event.reason)
        finally:
            self.engine.abort(name)

    def stats(self) -> EngineStats:
        """The engine's load and counters."""
        return self.engine.stats()

    def steps(self) -> tuple[StepRecord, ...]:
        """The engine's latest steps: what ran where and when."""
        return self.engine.steps()

    def timeline(self) -> Timeline:
        """What the cluster did so far, to be drawn or saved as a trace; also after `close`."""
        return Timeline.of_engine(self.engine)

    def close(self) -> None:
        """Aborts what runs and gives devices and memory back. May be called again."""
        self.engine.close()

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
        self, name: RequestId, token_ids: tuple[int, ...], params: SamplingParams
    ) -> tuple[RequestHandle, ...]:
        request = GenerationRequest(id=name, token_ids=token_ids, params=params)
        if params.n > 1:
            return self.engine.submit_samples(request)
        return (self.engine.submit(request),)

    def _abort(self, name: RequestId, params: SamplingParams) -> None:
        for i in range(params.n):
            self.engine.abort(sample_id(name, i))

    def _start(self, name: RequestId, prompt: Prompt, params: SamplingParams) -> _Job:
        token_ids: tuple[int, ...] = ()
        try:
            token_ids = encode_prompt(prompt, self.tokenizer)
            return _Job(token_ids=token_ids, handles=self._submit(name, token_ids, params))
        except RequestError as error:
            return _Job(token_ids=token_ids, error=str(error))

    def _answer(self, token_ids: tuple[int, ...], params: SamplingParams) -> RequestOutput:
        name = _new_id()
        try:
            handles = self._submit(name, token_ids, params)
            output = self._collect(_Job(token_ids=token_ids, handles=handles))
        finally:
            self._abort(name, params)
        for completion in output.outputs:
            self._raise_error(completion.error)
        return output

    def _collect(self, job: _Job) -> RequestOutput:
        if job.handles:
            outputs = tuple(self._complete(i, handle) for i, handle in enumerate(job.handles))
        else:
            refused = CompletionOutput(
                token_ids=(),
                text=None if self.tokenizer is None else "",
                finish_reason="error",
                error=job.error,
            )
            outputs = (refused,)
        return RequestOutput(prompt_token_ids=job.token_ids, outputs=outputs)

    def _complete(self, index: int, handle: RequestHandle) -> CompletionOutput:
        token_ids: list[int] = []
        text_ids: list[int] = []
        for event in handle:
            if isinstance(event, TokensEvent):
                token_ids += event.token_ids
                text_ids += event.text_ids
            else:
                end = event
        shared = () if handle.stem is None else self.engine.steps_of(handle.stem)
        return CompletionOutput(
            index=index,
            token_ids=tuple(token_ids),
            text=None if self.tokenizer is None else self.tokenizer.decode(text_ids),
            finish_reason=end.reason,
            stop_token=end.stop_token,
            error=end.error,
            steps=step_runs((*shared, *self.engine.steps_of(handle.id))),
            ttft_s=ttft_s(end.timings),
            decode_tokens_per_s=decode_rate(end.timings, len(token_ids)),
        )

    def _raise_error(self, error: str | None) -> None:
        if error is not None:
            raise LoongJaxError(error) if self.engine.alive else EngineClosedError(error)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """A prompt: submitted, with a handle for each answer, or refused at once (`error`)."""

    token_ids: tuple[int, ...]
    handles: tuple[RequestHandle, ...] = ()
    error: str | None = None


_numbers = itertools.count()


def _new_id() -> RequestId:
    return f"llm-{next(_numbers)}"


def _close_in_background(engine: Engine) -> None:
    if engine.alive:  # in a thread of its own, since a garbage collection must not wait
        threading.Thread(target=engine.close, name="loongjax-close", daemon=True).start()
