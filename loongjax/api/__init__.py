"""What notebooks and scripts import. Imports no jax until an `LLM` is made."""

from loongjax.api.async_llm import AsyncLLM
from loongjax.api.llm import LLM
from loongjax.api.outputs import CompletionOutput, RequestOutput, StepRun, StreamChunk
from loongjax.api.pending import PendingRequest
from loongjax.plan import TokenLogprobs
from loongjax.sampling.params import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "PendingRequest",
    "RequestOutput",
    "SamplingParams",
    "StepRun",
    "StreamChunk",
    "TokenLogprobs",
]
