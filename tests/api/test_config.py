"""A setting out of range is refused where it is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loongjax.config import ClusterConfig, EngineConfig, PoolConfig, engine_config
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


def test_a_file_gives_settings_and_arguments_go_before_it(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('instances = 4\ndegrees = [1, 4]\npool_slots = 64\ndtype = "float32"\n')
    found = engine_config(config=file, pool_slots=128, warm_up=True)
    assert found == EngineConfig(
        cluster=ClusterConfig(instances=4, degrees=(1, 4)),
        pool=PoolConfig(slots=128),
        dtype="float32",
        warm_up=True,
    )
    assert engine_config(config=str(file)).pool.slots == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instance = 4", "has 'instance', which is no setting; did you mean 'instances'?"),
        ("poolslots = 4", "did you mean 'pool_slots'?"),
        ("[cluster]\ninstances = 4", "has 'cluster', which is no setting; tables are not read"),
        ("instances = '4'", "instances must be int, not '4'"),
        ("warm_up = 1", "warm_up must be bool, not 1"),
        ("degrees = [1, true]", "degrees must be a list of int, not [1, True]"),
        ("dtype = 'float16'", "dtype must be 'float32' or 'bfloat16', not 'float16'"),
        ("instances = 0", "instances must be at least 1, not 0"),
        ("instances", "cannot read the configuration"),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "engine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        engine_config(config=file)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        engine_config(config=tmp_path / "absent.toml")
