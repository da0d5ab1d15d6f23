"""The engine is assembled from what the model, the configuration and the executor say."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from loongjax.api import build
from loongjax.cluster.topology import EverySubset
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.engine import GenerationRequest
from loongjax.errors import ConfigError
from loongjax.executor.host_time import HostTime
from loongjax.models.resolve import ResolvedModel, resolve
from loongjax.programs.catalogue import Catalogue
from loongjax.text import load_tokenizer
from tests.engine.fake_executor import VOCAB, FakeExecutor, answer
from tests.engine.rig import collect

MODEL = "random:tiny"


class FakeDevices(FakeExecutor):
    """A fake executor that knows its pool, its topology and its programs' sizes."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__()
        self.pool_slots = config.pool.slots or 5000
        self.topology = EverySubset(config.cluster.instances)
        self.host_time = HostTime()
        self.programs = SimpleNamespace(shapes=SimpleNamespace(tp=config.cluster.tensor_parallel))
        self.catalogue = Catalogue(
            self.topology,
            max_chunk_tokens=self.limits.max_chunk_tokens,
            max_rows=self.limits.max_rows,
            placed=False,
        )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevices]:
    """Executors that `build_engine` makes, fake ones."""
    executors: list[FakeDevices] = []

    def create(resolved: ResolvedModel, config: EngineConfig) -> FakeDevices:
        executors.append(FakeDevices(config))
        return executors[-1]

    monkeypatch.setattr(build, "_create_executor", create)
    return executors


def test_limits_come_from_model_config_and_executor(made: list[FakeDevices]) -> None:
    config = EngineConfig(
        cluster=ClusterConfig(instances=3), pool=PoolConfig(block_size=8, slots=1005)
    )
    built = build.build_engine(MODEL, config)
    with built.engine as engine:
        assert engine.limits.vocab_size == built.model.vocab_size
        assert engine.limits.max_model_len == 3001  # a token more than the pool holds
        assert (engine.limits.block_size, engine.limits.instance_slots) == (8, 1005)
        assert engine.limits.degree == 3
        assert built.tokenizer is not None
    assert made[0].closed


def test_context_is_the_models_where_the_pool_holds_it(made: list[FakeDevices]) -> None:
    config = EngineConfig(pool=PoolConfig(slots=10_000))
    built = build.build_engine(MODEL, config)
    with built.engine as engine:
        assert engine.limits.max_model_len == built.model.max_positions == 4096


def test_context_may_be_set_but_not_beyond_the_model(made: list[FakeDevices]) -> None:
    with build.build_engine(MODEL, EngineConfig(max_model_len=77)).engine as engine:
        assert engine.limits.max_model_len == 77
    with pytest.raises(ConfigError, match="max_model_len 5000 exceeds the 4096 positions"):
        build.build_engine(MODEL, EngineConfig(max_model_len=5000))
    assert len(made) == 1  # refused before anything was loaded


def test_end_tokens_of_model_and_tokenizer_both_count(
    made: list[FakeDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve(MODEL)
    tokens = answer((1, 2), 3)
    config = dataclasses.replace(resolved.config, vocab_size=VOCAB, eos_ids=(tokens[1],))
    tokenizer = load_tokenizer(resolved.tokenizer)
    assert tokenizer is not None
    with_eos = dataclasses.replace(tokenizer, eos_ids=(tokens[2],))
    monkeypatch.setattr(
        build, "resolve", lambda model: dataclasses.replace(resolved, config=config)
    )
    monkeypatch.setattr(build, "load_tokenizer", lambda files: with_eos)
    with build.build_engine(MODEL, EngineConfig()).engine as engine:
        for name, prompt in (("a", (1, 2)), ("b", (1, 2, *tokens[:2]))):
            handle = engine.submit(GenerationRequest(id=name, token_ids=prompt))
            assert collect(handle)[1].reason == "stop"


def test_executor_is_closed_where_the_engine_cannot_start(
    made: list[FakeDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**parts: object) -> None:
        raise ConfigError("no")

    monkeypatch.setattr(build, "Engine", refuse)
    with pytest.raises(ConfigError):
        build.build_engine(MODEL, EngineConfig())
    assert made[0].closed
