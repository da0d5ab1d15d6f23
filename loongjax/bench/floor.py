"""How fast this machine could be: the roofline that a cell's rate is held against.

No step is faster than reading its weights once at the memory's measured rate, nor than its
products at the measured rate of a large matrix product. Rates are measured in the same run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.bench.cells import Cell
from loongjax.models.config import ModelConfig

_READ_BYTES = 256 * 2**20
_MATMUL_SIZE = 2048
_REPEATS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the machine was measured to do, with the cores that engines have.

    Attributes:
      bytes_per_s: Reading memory in sequence.
      flops_per_s: A product of two square matrices; the better of float32 and the dtype
        asked for, since operands can be widened.
    """

    bytes_per_s: float
    flops_per_s: float


def measure_machine(dtype: str) -> Machine:
    """Measures the machine, in under a few seconds; the best of a few tries each."""
    return Machine(
        bytes_per_s=_read_rate(),
        flops_per_s=max(_matmul_rate(name) for name in {dtype, "float32"}),
    )


def floor_rate(cell: Cell, model: ModelConfig, itemsize: int, machine: Machine) -> float:
    """Tokens per second that the machine could do at most in a cell."""
    head = model.vocab_size * model.width
    layers = model.layers * _layer_weights(model)
    read_s = (layers + head) * itemsize / machine.bytes_per_s
    if cell.is_prefill:
        linear = 2 * (layers * cell.prompt + head)
        flops = linear + _attention_flops(model, cell.prompt * cell.prompt / 2)
        return cell.prompt / max(read_s, flops / machine.flops_per_s)
    context = cell.prompt + cell.tokens / 2
    flops = cell.batch * (2 * (layers + head) + _attention_flops(model, context))
    kv_bytes = cell.batch * context * model.kv_bytes_per_token(itemsize)
    read_s += kv_bytes / machine.bytes_per_s
    return cell.batch / max(read_s, flops / machine.flops_per_s)


def _layer_weights(model: ModelConfig) -> int:
    """Weights of the products of one layer."""
    attention = 2 * model.width * model.head_dim * (model.heads + model.kv_heads)
    return attention + 3 * model.width * model.ffn


def _attention_flops(model: ModelConfig, pairs: float) -> float:
    """Products of queries with keys, and of weights with values, for visible pairs."""
    return 4.0 * model.layers * model.heads * model.head_dim * pairs


def _read_rate() -> float:
    parts = np.array_split(np.ones(_READ_BYTES // 4, np.float32), 2)

    def read() -> None:
        threads = [threading.Thread(target=part.max) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return _READ_BYTES / _best_s(read)


def _matmul_rate(dtype: str) -> float:
    matrix = jnp.ones((_MATMUL_SIZE, _MATMUL_SIZE), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * _MATMUL_SIZE**3 / _best_s(lambda: product(matrix).block_until_ready())


def _best_s(run: Callable[[], object]) -> float:
    """Shortest of a few runs [s]; the first is not counted."""
    run()
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)
