"""The engine: requests in, tokens out. Imports no jax."""

from loongjax.engine.admission import Admission
from loongjax.engine.engine import Engine
from loongjax.engine.front import sample_id
from loongjax.engine.handle import OnEvent, OnSampleEvent, RequestHandle
from loongjax.engine.messages import (
    EngineStats,
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    InstanceStats,
    PoolSample,
    RequestRecord,
    StepCount,
    StepKind,
    StepRecord,
    StopWatch,
    Timings,
    TokenMask,
    TokensEvent,
)

__all__ = [
    "Admission",
    "Engine",
    "EngineStats",
    "Event",
    "FinishReason",
    "FinishedEvent",
    "GenerationRequest",
    "InstanceStats",
    "OnEvent",
    "OnSampleEvent",
    "PoolSample",
    "RequestHandle",
    "RequestRecord",
    "StepCount",
    "StepKind",
    "StepRecord",
    "StopWatch",
    "Timings",
    "TokenMask",
    "TokensEvent",
    "sample_id",
]
