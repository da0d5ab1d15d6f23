"""A model served in this process: what `LLM` and `AsyncLLM` have in common."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from loongjax.api.showing import served_html, stats_line
from loongjax.config import Dtype, engine_config
from loongjax.engine import Engine, EngineStats, StepRecord
from loongjax.plan import RequestId
from loongjax.text import Tokenizer
from loongjax.timeline import Timeline
from pallas_kernels.backend_names import Backend

_Served = TypeVar("_Served", bound="ServedModel")


class ServedModel:
    """A running engine and its tokenizer.

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
        policy: str = "elastic",
        cost_model: str | Path | None = None,
        dtype: Dtype | None = None,
        attention_backend: Backend | None = None,
        program_dir: str | Path | None = None,
        trust_library: str | Path | None = None,
        warm_up: bool = False,
        config: str | Path | None = None,
    ) -> None:
        """Loads a model and starts to serve it; may take minutes the first time.

        Args:
          model: `demo`, `random:NAME`, a folder, a `.gguf` file, or an id on the Hugging Face hub.
          instances: Elastic instances; each holds all weights and a share of the KV pool.
          tensor_parallel: Devices per instance.
          degrees: How many instances may work together; None: any number with a group (on
            emulated devices: powers of two, and `instances`).
          block_size: KV tokens per block.
          pool_slots: KV tokens per instance; None: what memory allows.
          max_model_len: Tokens of prompt and answer together; None: as many as the model and
            the pool allow.
          max_chunk_tokens: Prompt tokens that an instance computes in one step at most.
          policy: Who plans, such as `elastic`; settings after a colon
            (`loongjax.scheduler.policies`).
          cost_model: File with the times of steps here, which `loongjax profile` makes; None:
            they are estimated.
          dtype: `float32` or `bfloat16`; None: float32 on CPU, bfloat16 elsewhere.
          attention_backend: Which kernels run; None: the platform's own.
          program_dir: Folder of compiled programs; None: a folder of this user.
          trust_library: A folder of programs compiled elsewhere, to be read too, whoever owns
            it: whoever can write there can run code here.
          warm_up: Make all programs now, so that no request waits for a compilation; with a
            progress bar if stderr is a terminal.
          config: A TOML file with these arguments by name; what is given here goes before it.
            `loongjax.config` says what each of these costs.

        Raises:
          ConfigError, ModelError, BackendStartedError, StepError: See `loongjax.errors`.
        """
        from loongjax.api.build import build_engine

        settings = engine_config(
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
            config=config,
        )
        built = build_engine(str(model), settings)
        self._own(built.engine, built.tokenizer)

    @classmethod
    def from_engine(
        cls: type[_Served], engine: Engine, tokenizer: Tokenizer | None = None
    ) -> _Served:
        """One over an engine that runs already, and which it closes from now on."""
        served = cls.__new__(cls)
        served._own(engine, tokenizer)
        return served

    def _own(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        # A notebook cell that is run again drops its old LLM without closing it.
        weakref.finalize(self, _close_in_background, engine).atexit = False

    def stats(self) -> EngineStats:
        """The engine's load and counters."""
        return self.engine.stats()

    def steps(self) -> tuple[StepRecord, ...]:
        """The engine's latest steps: what ran where and when."""
        return self.engine.steps()

    def timeline(self) -> Timeline:
        """What the cluster did so far, to be drawn or saved as a trace; also after `close`."""
        return Timeline.of_engine(self.engine)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {stats_line(self.stats())}>"

    def _repr_html_(self) -> str:
        return served_html(type(self).__name__, self.stats(), self.timeline())

    def close(self) -> None:
        """Aborts what runs and gives devices and memory back. May be called again."""
        self.engine.close()


_numbers = itertools.count()


def new_id() -> RequestId:
    """A name that no other request of this process has."""
    return f"llm-{next(_numbers)}"


def _close_in_background(engine: Engine) -> None:
    if engine.alive:  # in a thread of its own, since a garbage collection must not wait
        threading.Thread(target=engine.close, name="loongjax-close", daemon=True).start()
