"""What notebooks and scripts import. Imports no jax until an `LLM` is made."""

from loongjax.api.llm import LLM
from loongjax.api.outputs import CompletionOutput, RequestOutput, StepRun, StreamChunk
from loongjax.sampling.params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StepRun",
    "StreamChunk",
]
