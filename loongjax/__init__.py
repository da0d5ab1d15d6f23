"""loongjax serves long-context language models with elastic sequence parallelism.

    from loongjax import LLM

    with LLM("demo", instances=2) as llm:
        print(llm.generate("Once upon a time")[0].text)

Importing this starts neither jax nor a device; making an `LLM` does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loongjax.api import (
        LLM,
        AsyncLLM,
        CompletionOutput,
        PendingRequest,
        RequestOutput,
        StepRun,
        StreamChunk,
    )
    from loongjax.errors import (
        BackendStartedError,
        BenchError,
        CapacityError,
        ConfigError,
        EngineClosedError,
        IntegrityError,
        LinesError,
        LoongJaxError,
        ModelError,
        PlanError,
        RequestError,
        StepError,
        UserError,
    )
    from loongjax.plan import TokenLogprobs
    from loongjax.sampling.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "BackendStartedError",
    "BenchError",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "EngineClosedError",
    "IntegrityError",
    "LinesError",
    "LoongJaxError",
    "ModelError",
    "PendingRequest",
    "PlanError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StepError",
    "StepRun",
    "StreamChunk",
    "TokenLogprobs",
    "UserError",
    "__version__",
]

_HOMES = {
    "LLM": "loongjax.api",
    "AsyncLLM": "loongjax.api",
    "PendingRequest": "loongjax.api",
    "CompletionOutput": "loongjax.api",
    "RequestOutput": "loongjax.api",
    "StepRun": "loongjax.api",
    "StreamChunk": "loongjax.api",
    "SamplingParams": "loongjax.sampling.params",
    "TokenLogprobs": "loongjax.plan",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'loongjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "loongjax.errors")), name)


def __dir__() -> list[str]:
    return __all__
