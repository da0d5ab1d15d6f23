"""How an engine is set up: the cluster, the KV pool, and limits. Imports no jax.

Numbers are checked when the object is made, so that nobody else needs to. What cannot be known
without the model, the devices, the policies or a file is checked where they are
(`loongjax.api.build`).
"""

from __future__ import annotations

import difflib
import inspect
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from loongjax.errors import ConfigError
from pallas_kernels.backend_names import BACKENDS, Backend

Dtype: TypeAlias = Literal["float32", "bfloat16"]
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """KV memory of one elastic instance.

    Attributes:
      block_size: Tokens per block. Idle memory: under one block per request and home.
        Host time: tables shrink as 1 / block_size. A change recompiles every program.
        1 is the paper's token granularity.
      slots: Tokens held, each 2 * layers * kv_heads * head_dim * itemsize bytes. Whole blocks
        alone are used. A compiled shape: a change recompiles every program. None: what the
        device's memory leaves, found at the first start.
    """

    block_size: int = 16
    slots: int | None = None

    def __post_init__(self) -> None:
        _at_least_one("block_size", self.block_size)
        if self.slots is not None and self.slots < self.block_size:
            raise ConfigError(
                f"pool slots {self.slots} are less than one block of {self.block_size}; give the "
                "pool more slots or lower block_size"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The devices, cut into elastic instances.

    Attributes:
      instances: Elastic instances; each holds one replica of the weights, and its own pool.
      tensor_parallel: Devices per instance, over which a replica is sharded. Divides memory
        per device and adds two reductions for each layer. A change recompiles every program.
      degrees: Numbers of instances that may work together. Programs to compile grow with
        their number. A request's KV must fit the largest. None: all that the hardware has
        groups for; on emulated devices the powers of two and `instances`.
    """

    instances: int = 1
    tensor_parallel: int = 1
    degrees: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _at_least_one("instances", self.instances)
        _at_least_one("tensor_parallel", self.tensor_parallel)
        if self.degrees is None:
            return
        if not self.degrees or list(self.degrees) != sorted(set(self.degrees)):
            raise ConfigError(f"degrees must ascend, without repeats, got {self.degrees}")
        if self.degrees[0] < 1 or self.degrees[-1] > self.instances:
            raise ConfigError(
                f"degrees {self.degrees} must lie in [1, {self.instances}], the number of "
                "instances; add instances or leave the others out"
            )

    @property
    def devices(self) -> int:
        """Devices that the cluster takes."""
        return self.instances * self.tensor_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Everything that an engine is built from, beside the model.

    Attributes:
      cluster: The devices.
      pool: KV memory.
      max_model_len: Tokens of prompt and answer together. Costs nothing by itself, but a
        request without `max_tokens` may claim this much of the pool. None: what the model
        was made for, or what the largest group's pool holds if that is less.
      max_chunk_tokens: Prompt tokens that each instance of a group computes in one step at
        most; longer prompts are computed in chunks, and decoding goes on in between. Memory
        for activations, and the largest program to compile, grow with it; below about 1,000
        the fixed cost of a step shows. Rounded up to a compiled size.
      policy: Who plans, by name, with settings after a colon (`scheduler/policies`), such as
        `loongserve:patience=2`.
      cost_model: File with the times of steps on these devices, which all policies but
        `first_come` ask (`loongjax profile`). None: times are estimated from what is publicly
        known of the devices, and corrected while the engine serves.
      dtype: Of weights, KV and activations. bfloat16 halves memory and is faster on
        accelerators; only float32 gives the same tokens at every degree. None: float32 on
        CPU, bfloat16 elsewhere.
      attention_backend: Which kernels run (`pallas_kernels.backend_names`). `xla` runs anywhere,
        the Pallas ones on their own hardware; the interpreted ones are for tests on CPU. A
        change recompiles every program. None: the platform's own.
      program_dir: Folder of compiled programs, which makes later starts fast. Loading one
        runs code, so nobody else may be able to write there. None: a folder of this user.
      trusted_program_dir: A program library made elsewhere, which is read too, whoever owns
        it: whoever can write there can run code here. Never written to.
      warm_up: Make all programs before the first request: minutes the first time, and then no
        request waits for a compilation. False: each is made when a step first needs it.
      strict_programs: Fail a step whose program warm-up did not make, instead of compiling it.
      kept_steps: Steps that are kept for looking back (`LLM.timeline`), and as many ended requests.
        Memory: up to 3 KB for each.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    max_model_len: int | None = None
    max_chunk_tokens: int = 2048
    policy: str = "elastic"
    cost_model: Path | None = None
    dtype: Dtype | None = None
    attention_backend: Backend | None = None
    program_dir: Path | None = None
    trusted_program_dir: Path | None = None
    warm_up: bool = False
    strict_programs: bool = False
    kept_steps: int = 100_000

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len must be at least 2 (a prompt token and an answer), not "
                f"{self.max_model_len}"
            )
        _at_least_one("max_chunk_tokens", self.max_chunk_tokens)
        _at_least_one("kept_steps", self.kept_steps)
        if self.strict_programs and not self.warm_up:
            raise ConfigError("strict_programs needs warm_up: no program would ever be made")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, not {self.dtype!r}")
        if self.attention_backend is not None and self.attention_backend not in BACKENDS:
            raise ConfigError(
                f"attention_backend must be one of {', '.join(BACKENDS)}, not "
                f"{self.attention_backend!r}"
            )


def engine_config(
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
) -> EngineConfig:
    """The configuration for the arguments of `loongjax.LLM`, which the commands share.

    `config` is a TOML file of the same arguments by name, such as `instances = 4`. What is given
    here, other than by its default, goes before what stands there.

    Raises:
      ConfigError: A value is out of range; or the file cannot be read, or has a key that is none
        of these or a value of another kind.
    """
    if config is not None:
        given = {name: value for name, value in locals().items() if name != "config"}
        told = {name: value for name, value in given.items() if value != _DEFAULTS[name]}
        return engine_config(**(read_settings(config) | told))
    return EngineConfig(
        cluster=ClusterConfig(
            instances=instances,
            tensor_parallel=tensor_parallel,
            degrees=None if degrees is None else tuple(degrees),
        ),
        pool=PoolConfig(block_size=block_size, slots=pool_slots),
        max_model_len=max_model_len,
        max_chunk_tokens=max_chunk_tokens,
        policy=policy,
        cost_model=_path(cost_model),
        dtype=dtype,
        attention_backend=attention_backend,
        program_dir=_path(program_dir),
        trusted_program_dir=_path(trust_library),
        warm_up=warm_up,
    )


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(engine_config).parameters.items()
    if name != "config"
}


def read_settings(file: str | Path) -> dict[str, Any]:
    """The arguments of `engine_config` that a TOML file gives.

    Raises:
      ConfigError: As `engine_config`.
    """
    path = Path(file).expanduser()
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    kinds = get_type_hints(engine_config)
    for name, value in settings.items():
        if name not in _DEFAULTS:
            raise ConfigError(f"{path} has {name!r}, which is no setting; {_hint(name, value)}")
        if not _is_a(value, kinds[name]):
            raise ConfigError(f"{path}: {name} must be {_words(kinds[name])}, not {value!r}")
    return settings


def _hint(name: str, value: object) -> str:
    if isinstance(value, dict):
        return "tables are not read, settings stand at the top"
    near = difflib.get_close_matches(name, _DEFAULTS, n=1)
    return f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(_DEFAULTS)}"


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value of a TOML file is of an argument's kind."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is Sequence:
        return isinstance(value, list) and all(_is_a(each, *get_args(kind)) for each in value)
    if get_args(kind):
        return any(_is_a(value, each) for each in get_args(kind))
    return type(value) is kind


def _words(kind: Any) -> str:
    """What `_is_a` accepts, for a user."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Sequence:
        return f"a list of {_words(*get_args(kind))}"
    if get_args(kind):
        return " or ".join(_words(each) for each in get_args(kind) if each is not NoneType)
    return str(kind.__name__)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")
