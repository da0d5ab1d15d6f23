"""After warm-up nothing compiles, neither our programs nor anything of jax's own."""

from __future__ import annotations

import logging
import threading
from collections import Counter

import jax
import numpy as np
import pytest

from loongjax import LLM, SamplingParams
from loongjax.api.build import build_engine
from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.errors import ConfigError, StepError
from loongjax.executor import warm_up as module
from loongjax.executor.create import create_executor
from loongjax.executor.warm_up import warm_up
from loongjax.models.random_weights import RandomSource
from loongjax.programs.library import ProgramLibrary
from tests.esp.rig import TINY

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


pytestmark = pytest.mark.usefixtures("room")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def few_programs(tmp_path_factory):
    """A folder for one instance, without its prefill program."""
    return tmp_path_factory.mktemp("few_programs")


def config(programs, **changes) -> EngineConfig:
    settings = {
        "cluster": ClusterConfig(instances=3, degrees=(1, 2)),
        "pool": PoolConfig(block_size=4, slots=160),
        "max_model_len": 300,
        "max_chunk_tokens": 100,
        "program_dir": programs,
        "warm_up": True,
        "strict_programs": True,
    }
    return EngineConfig(**(settings | changes))


@pytest.fixture
def compilations():
    """Everything that this process compiles, by any thread."""
    found: list[str] = []

    def listen(event: str, seconds: float, **details: object) -> None:
        if event == COMPILE_EVENT:
            found.append(f"{details.get('fun_name')} in {threading.current_thread().name}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_mixed_load_compiles_nothing_after_warm_up(programs, compilations):
    """Prompts of all sizes: alone, packed, over several instances, in chunks; preempted ones."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 140, 20).tolist(), 280, 250, 3]
    prompts = [rng.integers(0, TINY.vocab_size, length).tolist() for length in lengths]
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
    built = build_engine("random:tiny", config(programs))
    with LLM.from_engine(built.engine) as llm:
        warmed = llm.stats().programs
        # 3 + 3 groups; on each an extend and three decode programs, on pairs migrate
        assert warmed.compiled + warmed.loaded == 4 + 5
        assert warmed.compiled + warmed.loaded + warmed.rebound == 3 * 4 + 3 * 5
        assert llm.stats().steps == ()
        assert compilations, "the listener hears nothing"
        compilations.clear()
        outputs = [*llm.generate(prompts, params), llm.generate(prompts[0], params)[0]]
        stats = llm.stats()
    assert [output.error for output in outputs] == [None] * len(outputs)
    assert {(step.kind, step.degree) for step in stats.steps} >= {
        *(("prefill", 1), ("prefill", 2), ("decode", 1), ("decode", 2))
    }
    assert any(run.count > 1 for out in outputs for run in out.steps if run.kind == "prefill")
    assert compilations == []
    assert stats.programs == warmed
    assert stats.programs.compiled_after_warm_up == 0


def test_tokens_do_not_depend_on_room_for_programs(programs, monkeypatch):
    """With room for one program, every other step unbinds one that may still run."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, TINY.vocab_size, length).tolist() for length in (5, 150, 40, 90)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
    answers = []
    for roomy in (True, False):
        monkeypatch.setattr(module.mappings, "has_room", lambda roomy=roomy: roomy)
        with LLM.from_engine(build_engine("random:tiny", config(programs)).engine) as llm:
            answers.append([output.token_ids for output in llm.generate(prompts, params)])
            counts = llm.stats().programs
        assert (counts.unbound > 0) is not roomy
        assert counts.compiled_after_warm_up == 0
    assert answers[0] == answers[1]


def lacking(catalogue, kind: str):
    """The same catalogue, whose list forgets the programs of a kind."""

    class Lacking(type(catalogue)):
        @property
        def specs(self):
            return tuple(spec for spec in super().specs if spec.kind != kind)

    catalogue.__class__ = Lacking


@pytest.fixture
def incomplete(monkeypatch):
    """Warm-up forgets the programs for large chunks."""
    plain = module.warm_up

    def forgetful(executor, on_progress=None):
        lacking(executor.catalogue, "extend")
        plain(executor, on_progress)

    monkeypatch.setattr(module, "warm_up", forgetful)


@pytest.mark.usefixtures("incomplete")
def test_strict_programs_fail_what_warm_up_forgot(few_programs):
    one = ClusterConfig(instances=1)
    built = build_engine("random:tiny", config(few_programs, cluster=one))
    with LLM.from_engine(built.engine) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
        assert llm.stats().programs.compiled_after_warm_up == 0
    assert "program extend-d1-t128-r32 would have to be compiled after warm-up" in output.error


@pytest.mark.usefixtures("incomplete")
def test_else_it_is_compiled_counted_and_named(few_programs, caplog):
    one = ClusterConfig(instances=1)
    settings = config(few_programs, cluster=one, strict_programs=False)
    built = build_engine("random:tiny", settings)
    with LLM.from_engine(built.engine) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
        assert llm.stats().programs.compiled_after_warm_up == 1
    assert output.error is None
    assert "for extend-d1-t128-r32 after warm-up" in caplog.text


@pytest.fixture
def executor(programs):
    made = create_executor(TINY, RandomSource(config=TINY), config(programs))
    yield made
    made.close()


@pytest.fixture
def bound(monkeypatch):
    """What programs were asked for, and for which groups, in order."""
    found = []
    get = ProgramLibrary.get

    def watch(self, spec, group):
        program = get(self, spec, group)
        found.append((spec, group))
        return program

    monkeypatch.setattr(ProgramLibrary, "get", watch)
    return found


def test_groups_beyond_a_bound_are_left_and_the_log_says_so(executor, bound, monkeypatch, caplog):
    """Every other group is bound, and every program once."""
    monkeypatch.setattr(module, "_GROUPS_OF_A_DEGREE", 2)
    told = []
    with caplog.at_level(logging.INFO):
        warm_up(executor, lambda done, total, what: told.append((done, total, what)))
    assert {group for _, group in bound} == {(0,), (1,), (0, 1), (0, 2)}
    assert {spec for spec, _ in bound} == set(executor.catalogue.specs)
    assert "warm-up binds 2 groups of degree 2; others are bound when first needed" in caplog.text
    assert "warm-up: 9 programs on 4 groups" in caplog.text
    assert [done for done, _, _ in told] == list(range(2 * 4 + 2 * 5 + 4 + 1))
    assert {total for _, total, _ in told} == {told[-1][0]}


def test_groups_that_cannot_be_mapped_are_left_and_the_log_says_so(
    executor, bound, monkeypatch, caplog
):
    """Every program is made; a group that has none of them runs no step."""
    monkeypatch.setattr(module.mappings, "has_room", lambda: False)
    warm_up(executor)
    assert {group for _, group in bound} == {(0,), (0, 1)}
    assert {spec for spec, _ in bound} == set(executor.catalogue.specs)
    assert "warm-up: 4 groups have no room for their programs" in caplog.text
    assert executor.programs.guard.armed


def test_no_program_is_unbound_for_one_that_may_never_be_needed(
    executor, bound, monkeypatch, caplog
):
    """The room ends in the middle of a group."""
    monkeypatch.setattr(module.mappings, "has_room", lambda: len(bound) < 9 + 4 + 1)
    with caplog.at_level(logging.INFO):
        warm_up(executor)
    assert executor.program_counts.unbound == 0
    assert Counter(group for _, group in bound[: 9 + 4 + 1]) == {
        (0,): 4,
        (0, 1): 5,
        (1,): 4,
        (2,): 1,
    }
    assert "warm-up: 3 groups have no room for their programs" in caplog.text
    assert "warm-up: 9 programs on 3 groups" in caplog.text


def test_a_first_step_that_fails_is_an_error(executor, monkeypatch):
    def fail(*_):
        raise RuntimeError("no communicator")

    monkeypatch.setattr(type(executor), "_launch", fail)
    with pytest.raises(StepError, match=r"an empty step on group \(0,\) failed: .*communicator"):
        warm_up(executor)
    assert not executor.programs.guard.armed


def test_strict_programs_need_warm_up():
    with pytest.raises(ConfigError, match="strict_programs needs warm_up"):
        EngineConfig(strict_programs=True)
