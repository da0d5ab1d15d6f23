"""The engine: requests in, tokens out. Imports no jax."""

from loongjax.engine.admission import Admission
from loongjax.engine.engine import Engine
from loongjax.engine.handle import OnEvent, RequestHandle
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
    Timings,
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
    "PoolSample",
    "RequestHandle",
    "RequestRecord",
    "StepCount",
    "StepKind",
    "StepRecord",
    "Timings",
    "TokensEvent",
]
