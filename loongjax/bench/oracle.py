"""Whether greedy answers are right: each token held to a plain float32 forward pass.

The pass has no pool, no groups and no kernels but the reference's, so that it shares none of what
it is to judge. Meant for small models: it computes whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from loongjax.models.decoder import Decoder
from loongjax.models.placement import place_weights
from loongjax.models.resolve import resolve
from pallas_kernels import reference

Verdict: TypeAlias = Literal["right", "tie", "wrong"]

_TIE = 2e-4
"""Twice the error that a served logit may have, relative to the largest."""
_STEP = 64


class Oracle:
    """Judges answers of one model."""

    def __init__(self, model: str) -> None:
        """Raises ModelError as `resolve`."""
        self._resolved = resolve(model)

    def judge(self, prompt: Sequence[int], answer: Sequence[int]) -> Verdict:
        """`right`: each token has the highest logit; `tie`: some have one that is as high, as far
        as float32 can tell; else `wrong`.
        """
        logits = self._logits([*prompt, *answer])
        bound, verdict = _TIE * np.abs(logits).max(), "right"
        for position, token in enumerate(answer, len(prompt)):
            row = logits[position - 1]
            if row.max() - row[token] > bound:
                return "wrong"
            if token != int(row.argmax()):
                verdict = "tie"
        return "tie" if verdict == "tie" else "right"

    def _logits(self, ids: Sequence[int]) -> np.ndarray:
        length = -(-len(ids) // _STEP) * _STEP  # what is behind a token does not matter to it
        padded = np.zeros(length, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(self._forward(self._weights, padded))[: len(ids)]

    @cached_property
    def _weights(self) -> Any:
        placed = place_weights(
            self._resolved.config,
            self._resolved.source,
            [[jax.devices()[0]]],
            np.float32,
            stacked=False,
        )
        return jax.tree.map(lambda leaf: leaf.shards[0][0], placed.tree)

    @cached_property
    def _forward(self) -> Any:
        decoder = Decoder(self._resolved.config)

        @jax.jit
        def run(weights: Any, tokens: jax.Array) -> jax.Array:
            params = {"params": weights}
            positions = jnp.arange(len(tokens))
            x, _ = decoder.apply(params, tokens, positions, _attend, None)
            return decoder.apply(params, x, method="logits")

        return run


def _attend(
    state: None, *, layer: Any, window: int | None, q_TxHxD: Any, k_TxGxD: Any, v_TxGxD: Any
) -> tuple[Any, None]:
    index = jnp.arange(len(q_TxHxD))
    visible = index[:, None] >= index
    if window is not None:
        visible &= index[:, None] - index < window
    scale = q_TxHxD.shape[-1] ** -0.5
    return reference.attention(q_TxHxD, k_TxGxD, v_TxGxD, visible, scale=scale).o, state
