"""An executor driven step by step, and a float32 reference to hold it against.

The rig plays scheduler and engine: it makes steps by hand, so that a test decides group,
homes, masters and company of every token. It returns logits, not only tokens: the programs
are traced with `sample` replaced by a probe that gives the bits of one logit of each row,
the one whose token id stands in the row's seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from loongjax.config import ClusterConfig, EngineConfig, PoolConfig
from loongjax.esp import sampling
from loongjax.executor.create import create_executor
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.executor.protocol import RequestInput
from loongjax.kvcache import BlockAllocator
from loongjax.models.config import ModelConfig
from loongjax.models.decoder import Decoder
from loongjax.models.placement import place_weights
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Group,
    MigrateStep,
    Move,
    Placement,
    PrefillStep,
    Share,
    Step,
    StepResult,
)
from loongjax.sampling.fields import SAID
from loongjax.sampling.params import SamplingParams
from pallas_kernels import reference
from pallas_kernels.backend_names import Backend

TINY = random_config("tiny")
GREEDY = SamplingParams(temperature=0)
WINDOWED = replace(TINY, windows=tuple(None if layer % 2 else 7 for layer in range(TINY.layers)))


def probe(logits_RxV, rows, tables):
    """Stands in for `sample`: the bits of logit `seed` of each row."""
    found_Rx1 = jnp.take_along_axis(logits_RxV, rows.seed[:, None], axis=1)
    bits_Rx1 = lax.bitcast_convert_type(found_Rx1, jnp.int32)
    return jnp.pad(bits_Rx1, ((0, 0), (0, SAID - 1)))


@contextmanager
def probing() -> Iterator[None]:
    """Programs that are traced inside return logits for tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "sample", probe)
        yield


class Rig:
    """A cluster of emulated instances with the smallest random model on it."""

    def __init__(
        self,
        *,
        instances: int,
        tensor_parallel: int = 1,
        block_size: int = 1,
        slots: int = 256,
        model: ModelConfig = TINY,
        dtype: str = "float32",
        attention_backend: Backend | None = None,
        max_chunk_tokens: int = 2048,
        program_dir=None,
    ) -> None:
        config = EngineConfig(
            cluster=ClusterConfig(
                instances=instances,
                tensor_parallel=tensor_parallel,
                degrees=tuple(range(1, instances + 1)),
            ),
            pool=PoolConfig(block_size=block_size, slots=slots),
            max_model_len=512,
            max_chunk_tokens=max_chunk_tokens,
            dtype=dtype,
            attention_backend=attention_backend,
            program_dir=program_dir,
        )
        self.model = model
        self.executor: JaxExecutor = create_executor(model, RandomSource(config=model), config)
        self.allocator = BlockAllocator(instances=instances, slots=slots, block_size=block_size)
        self._seq = 0

    def admit(
        self,
        request: str,
        token_ids: Sequence[int],
        *,
        probe_token: int = 0,
        params: SamplingParams = GREEDY,
    ) -> None:
        """Makes a request known; `probe_token` is the logit to be returned."""
        self.executor.admit(
            RequestInput(
                id=request,
                token_ids=tuple(token_ids),
                params=params,
                seed=probe_token,
            )
        )

    def prefill(
        self, group: Group, prompts: Mapping[str, int], keep: Mapping[str, Mapping[int, int]]
    ) -> StepResult:
        """Computes whole prompts (request: length); `keep` is tokens by instance."""
        step = PrefillStep(
            seq=self.next_seq(),
            group=group,
            chunks=tuple(
                Chunk(request=name, start=0, length=length, last=True)
                for name, length in prompts.items()
            ),
            keep=tuple(
                Placement(
                    request=name, shares=tuple(Share(i, n) for i, n in keep[name].items() if n)
                )
                for name in prompts
            ),
        )
        return self.run(step)

    def extend(
        self, group: Group, chunks: Sequence[Chunk], keep: Mapping[str, Mapping[int, int]]
    ) -> StepResult:
        """Computes chunks, of which some or all have history; `keep` as in `prefill`."""
        placements = tuple(
            Placement(
                request=chunk.request,
                shares=tuple(Share(i, n) for i, n in keep[chunk.request].items() if n),
            )
            for chunk in chunks
        )
        step = PrefillStep(seq=self.next_seq(), group=group, chunks=tuple(chunks), keep=placements)
        return self.run(step)

    def decode(self, group: Group, rows: Sequence[DecodeRow]) -> StepResult:
        """One decode step."""
        return self.run(DecodeStep(seq=self.next_seq(), group=group, rows=tuple(rows)))

    def migrate(self, group: Group, moves: Sequence[Move]) -> StepResult:
        """Moves KV inside a group."""
        return self.run(MigrateStep(seq=self.next_seq(), group=group, moves=tuple(moves)))

    def homes(self, request: str) -> set[int]:
        """Instances with KV of a request."""
        return {share.instance for share in self.allocator.shares(request)}

    def release(self, request: str) -> None:
        """Ends a request."""
        self.allocator.release(request)
        self.executor.forget(request)

    def next_seq(self) -> int:
        """The number of the next step."""
        self._seq += 1
        return self._seq

    def run(self, step: Step) -> StepResult:
        """Runs one step to its end."""
        self.executor.submit(step, self.allocator.apply(step))
        self.allocator.check_integrity()
        results = []
        while not results:
            results = self.executor.poll(60.0)
        assert results[0].error is None, results[0].error
        return results[0]


def logits_of(result: StepResult) -> dict[str, float]:
    """What the probe returned, by request."""
    return {name: float(np.int32(bits).view(np.float32)) for name, bits, _ in result.tokens}


@lru_cache(maxsize=8)
def _reference_weights(model: ModelConfig):
    placed = place_weights(
        model, RandomSource(config=model), [[jax.devices()[0]]], np.float32, stacked=False
    )
    return jax.tree.map(lambda leaf: leaf.shards[0][0], placed.tree)


def _plain_attention(state, *, layer, window, q_TxHxD, k_TxGxD, v_TxGxD):
    index = jnp.arange(len(q_TxHxD))
    visible = index[:, None] >= index
    if window is not None:
        visible &= index[:, None] - index < window
    scale = q_TxHxD.shape[-1] ** -0.5
    return reference.attention(q_TxHxD, k_TxGxD, v_TxGxD, visible, scale=scale).o, state


@lru_cache(maxsize=8)
def _reference_program(model: ModelConfig, length: int):
    decoder = Decoder(model)

    @jax.jit
    def run(weights, tokens):
        params = {"params": weights}
        x, _ = decoder.apply(params, tokens, jnp.arange(length), _plain_attention, None)
        return decoder.apply(params, x, method="logits")

    return run


def reference_logits(token_ids: Sequence[int], model: ModelConfig = TINY) -> np.ndarray:
    """Logits [T, V] after each token of a sequence, computed in one piece in float32."""
    length = -(-len(token_ids) // 64) * 64  # few shapes; what is behind a token does not matter
    padded = np.zeros(length, np.int32)
    padded[: len(token_ids)] = token_ids
    logits = _reference_program(model, length)(_reference_weights(model), padded)
    return np.asarray(logits)[: len(token_ids)]
