from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_KIND_UNSPECIFIED: _ClassVar[StepKind]
    STEP_KIND_PREFILL: _ClassVar[StepKind]
    STEP_KIND_DECODE: _ClassVar[StepKind]
    STEP_KIND_MIGRATE: _ClassVar[StepKind]
STEP_KIND_UNSPECIFIED: StepKind
STEP_KIND_PREFILL: StepKind
STEP_KIND_DECODE: StepKind
STEP_KIND_MIGRATE: StepKind

class WatchRequest(_message.Message):
    __slots__ = ("interval_s",)
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    def __init__(self, interval_s: _Optional[float] = ...) -> None: ...

class Instance(_message.Message):
    __slots__ = ("id", "slots", "used", "is_draining")
    ID_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    id: int
    slots: int
    used: int
    is_draining: bool
    def __init__(self, id: _Optional[int] = ..., slots: _Optional[int] = ..., used: _Optional[int] = ..., is_draining: _Optional[bool] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("instances", "requests")
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.RepeatedScalarFieldContainer[int]
    requests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, instances: _Optional[_Iterable[int]] = ..., requests: _Optional[_Iterable[str]] = ...) -> None: ...

class ClusterState(_message.Message):
    __slots__ = ("time", "instances", "groups", "waiting", "running", "policy")
    TIME_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    time: float
    instances: _containers.RepeatedCompositeFieldContainer[Instance]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    waiting: int
    running: int
    policy: str
    def __init__(self, time: _Optional[float] = ..., instances: _Optional[_Iterable[_Union[Instance, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., policy: _Optional[str] = ...) -> None: ...

class WatchStepsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KeptTokens(_message.Message):
    __slots__ = ("instance", "tokens")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    instance: int
    tokens: int
    def __init__(self, instance: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("seq", "kind", "group", "requests", "tokens", "kept", "masters", "started", "ended", "error")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    MASTERS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    seq: int
    kind: StepKind
    group: _containers.RepeatedScalarFieldContainer[int]
    requests: _containers.RepeatedScalarFieldContainer[str]
    tokens: int
    kept: _containers.RepeatedCompositeFieldContainer[KeptTokens]
    masters: _containers.RepeatedScalarFieldContainer[int]
    started: float
    ended: float
    error: str
    def __init__(self, seq: _Optional[int] = ..., kind: _Optional[_Union[StepKind, str]] = ..., group: _Optional[_Iterable[int]] = ..., requests: _Optional[_Iterable[str]] = ..., tokens: _Optional[int] = ..., kept: _Optional[_Iterable[_Union[KeptTokens, _Mapping]]] = ..., masters: _Optional[_Iterable[int]] = ..., started: _Optional[float] = ..., ended: _Optional[float] = ..., error: _Optional[str] = ...) -> None: ...

class DrainInstanceRequest(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: int
    def __init__(self, instance: _Optional[int] = ...) -> None: ...

class DrainInstanceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeInstanceRequest(_message.Message):
    __slots__ = ("instance",)
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    instance: int
    def __init__(self, instance: _Optional[int] = ...) -> None: ...

class ResumeInstanceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetPolicyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: str
    def __init__(self, policy: _Optional[str] = ...) -> None: ...

class SetPolicyResponse(_message.Message):
    __slots__ = ("previous",)
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    previous: str
    def __init__(self, previous: _Optional[str] = ...) -> None: ...

class GetCostModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCostModelResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...
