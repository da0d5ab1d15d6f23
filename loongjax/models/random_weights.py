"""Models with random weights, by the name of their shape: for benchmarks, tests, planning.

Owns the named shapes and the values. A value depends on the tensor's place in the tree
and its row alone, so that shards, orders of loading, tp, and runs all agree.

Scales keep activations of order 1, and attention and logits sharp enough that answers
depend on the whole context and have clear winners. Imports no jax.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig, RopeConfig
from loongjax.models.weights import Index, WeightSpec

_ROWS = 256
"""Rows of a tensor that one random stream makes. A change changes every value."""
_SCORE_STD = 3.0
"""Standard deviation of attention scores; 1 would average thousands of values to nothing."""
_LOGIT_STD = 4.0
_SPREAD = 0.1
"""Standard deviation of norm weights about 1, and of biases about 0."""


def _shape(base: float, **fields: Any) -> ModelConfig:
    defaults: dict[str, Any] = {
        "family": "llama",
        "norm_eps": 1e-5,
        "tied_embeddings": False,
        "rope": RopeConfig(base=base),
        "windows": (None,) * fields["layers"],
        "head_dim": 128,
    }
    return ModelConfig(**(defaults | fields))


_SHAPES = {
    "tiny": _shape(
        1e4, vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128,
        max_positions=4_096,
    ),
    "bench58m": _shape(
        1e6, vocab_size=32_000, width=512, layers=8, heads=8, kv_heads=4, head_dim=64, ffn=1_536,
        max_positions=131_072,
    ),
    "llama2-7b": _shape(
        1e4, vocab_size=32_000, width=4_096, layers=32, heads=32, kv_heads=32, ffn=11_008,
        max_positions=4_096,
    ),
    "llama3-8b": _shape(
        5e5, vocab_size=128_256, width=4_096, layers=32, heads=32, kv_heads=8, ffn=14_336,
        max_positions=8_192,
    ),
    "llama3-70b": _shape(
        5e5, vocab_size=128_256, width=8_192, layers=80, heads=64, kv_heads=8, ffn=28_672,
        max_positions=8_192,
    ),
    "qwen3-8b": _shape(
        1e6, family="qwen3", vocab_size=151_936, width=4_096, layers=36, heads=32, kv_heads=8,
        ffn=12_288, max_positions=40_960, norm_eps=1e-6, qk_norm=True,
    ),
}  # fmt: skip


def random_config(name: str) -> ModelConfig:
    """The named shape. Raises ModelError, listing the known names, for an unknown one."""
    if name not in _SHAPES:
        raise ModelError(
            f"no random model is called {name!r}; known are {', '.join(sorted(_SHAPES))}"
        )
    return _SHAPES[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomSource:
    """Weights drawn as they are read, in float32. Always the same ones."""

    config: ModelConfig

    def read(self, spec: WeightSpec, index: Index) -> np.ndarray:
        """Part of a tensor; see `WeightSource.read`."""
        rows, *columns = index
        values = np.empty((rows.stop - rows.start, *spec.stored_shape[1:]), np.float32)
        for block in range(rows.start // _ROWS, -(-rows.stop // _ROWS)):
            first = block * _ROWS
            drawn = _draw(spec, block)
            start, stop = max(rows.start, first), min(rows.stop, first + len(drawn))
            values[start - rows.start : stop - rows.start] = drawn[start - first : stop - first]
        mean, std = self._moments(spec)
        values *= np.float32(std)
        values += np.float32(mean)
        return values[(slice(None), *columns)]

    def _moments(self, spec: WeightSpec) -> tuple[float, float]:
        """Mean and standard deviation of a tensor's values.

        Scores are q . k / sqrt(D) with k of order 1: q, or its norm, carries their scale.
        """
        fan_in = 1 / math.sqrt(spec.stored_shape[-1])
        if spec.key == "q_norm":
            return _SCORE_STD, _SPREAD
        if spec.key.endswith("norm"):
            return 1.0, _SPREAD
        if spec.key.endswith("bias"):
            return 0.0, _SPREAD
        if spec.key == "embed":
            return 0.0, _LOGIT_STD * fan_in if self.config.tied_embeddings else 1.0
        if spec.key == "lm_head":
            return 0.0, _LOGIT_STD * fan_in
        if spec.key == "q" and not self.config.qk_norm:
            return 0.0, _SCORE_STD * fan_in
        return 0.0, fan_in


def _draw(spec: WeightSpec, block: int) -> np.ndarray:
    """Standard normal rows of one block, from a stream keyed by the tensor and the block."""
    digest = hashlib.sha256(f"{spec.path}/{block}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    rows = min(_ROWS, spec.stored_shape[0] - block * _ROWS)
    return generator.standard_normal((rows, *spec.stored_shape[1:]), dtype=np.float32)
