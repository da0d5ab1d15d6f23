"""Engines on emulated devices: what their requests ask, and the answers held to a reference.

Programs take half a minute to compile, so the tests of engines on devices share executors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.executor.create import create_executor
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.models.config import ModelConfig
from loongjax.models.random_weights import RandomSource
from pallas_kernels.backend_names import Backend
from tests.engine.scripted import Role
from tests.esp.lives import EPSILON
from tests.esp.rig import TINY, WINDOWED, reference_logits

SLOTS = 64  # of each instance
BUCKET = 64  # prompt tokens that a rank takes in one step: the smallest there is


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What an engine runs on.

    Attributes:
      model: Its first layer has a window in `WINDOWED`, its second sees everything.
      instances: How many there are.
      block_size: Tokens per block.
      degrees: Of its groups; None: every one.
      attention_backend: Its kernels; None: those of the platform.
    """

    model: ModelConfig
    instances: int
    block_size: int
    degrees: tuple[int, ...] | None = None
    attention_backend: Backend | None = None


TOKENS = Stage(model=WINDOWED, instances=4, block_size=1)
BLOCKS = Stage(model=TINY, instances=2, block_size=4)


def make_executor(stage: Stage, program_dir: Path) -> JaxExecutor:
    degrees = stage.degrees or tuple(range(1, stage.instances + 1))
    config = EngineConfig(
        cluster=ClusterConfig(instances=stage.instances, degrees=degrees),
        pool=PoolConfig(block_size=stage.block_size, slots=SLOTS),
        max_chunk_tokens=BUCKET,
        attention_backend=stage.attention_backend,
        program_dir=program_dir,
    )
    return create_executor(stage.model, RandomSource(config=stage.model), config)


@lru_cache(maxsize=8)
def document(number: int) -> tuple[int, ...]:
    rng = np.random.default_rng(number)
    return tuple(rng.integers(0, TINY.vocab_size, 256).tolist())


@lru_cache(maxsize=2000)
def reference(tokens: tuple[int, ...], model: ModelConfig) -> np.ndarray:
    return reference_logits(tokens, model)


@jax.jit
def gumbel(seed: int, sample: int, position: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
    return jax.random.gumbel(key, (TINY.vocab_size,), jnp.float32)


def count_ties(role: Role, model: ModelConfig) -> int:
    """Checks every token against the reference; counts those that a tie may have decided."""
    return sum(
        _count_ties(role, sample, tuple(answer.tokens), model)
        for sample, answer in enumerate(role.answers)
    )


def _count_ties(role: Role, sample: int, answer: tuple[int, ...], model: ModelConfig) -> int:
    temperature, seed = role.params.temperature, role.params.seed
    logits = reference((*role.prompt, *answer), model)
    bound, ties = 2 * EPSILON * np.abs(logits).max(), 0
    for position, token in enumerate(answer, len(role.prompt)):
        row = logits[position - 1]
        if temperature:
            row = row + temperature * np.asarray(gumbel(seed, sample, position))
        assert row.max() - row[token] <= bound
        ties += token != int(row.argmax())
    return ties
