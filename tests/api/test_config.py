"""A setting out of range is refused where it is made."""

from __future__ import annotations

import re

import pytest

from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.errors import ConfigError


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (PoolConfig, {"block_size": 0}, "block_size must be at least 1, not 0"),
        (PoolConfig, {"slots": 15}, "pool slots 15 are less than one block of 16"),
        (ClusterConfig, {"instances": 0}, "instances must be at least 1, not 0"),
        (ClusterConfig, {"tensor_parallel": -1}, "tensor_parallel must be at least 1, not -1"),
        (ClusterConfig, {"degrees": ()}, "degrees must ascend, without repeats, got ()"),
        (ClusterConfig, {"degrees": (2, 1)}, "degrees must ascend"),
        (ClusterConfig, {"degrees": (1, 1)}, "degrees must ascend"),
        (ClusterConfig, {"instances": 4, "degrees": (1, 8)}, "must lie in [1, 4]"),
        (ClusterConfig, {"degrees": (0, 1)}, "must lie in [1, 1]"),
        (EngineConfig, {"max_model_len": 1}, "max_model_len must be at least 2"),
    ],
)
def test_refusals_name_the_numbers(kind: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        kind(**fields)


def test_limits_themselves_are_taken() -> None:
    assert PoolConfig(block_size=16, slots=16).slots == 16
    assert ClusterConfig(instances=4, degrees=(1, 4)).degrees == (1, 4)
    assert ClusterConfig(instances=4, tensor_parallel=2).devices == 8
    assert EngineConfig(max_model_len=2, dtype="bfloat16").pool == PoolConfig()


@pytest.mark.usefixtures("without_shape_checks")  # they would refuse it first
def test_unknown_attention_backend_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="pallas-hopper, interpret, interpret-tpu, not 'cuda'"):
        EngineConfig(**{"attention_backend": "cuda"})
