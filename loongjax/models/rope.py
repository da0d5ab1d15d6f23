"""Rotary position embedding: frequencies on the host, rotation on the device.

Promises: the frequencies that transformers computes, stretched as `RopeConfig` says;
angles and rotation in float32 whatever the dtype of the activations. A float32 angle at
position p is good to p * 6e-8 rad, which is part of how these models were trained, so it
is kept as it is. Positions are exact up to 2**24.
Not here: which checkpoints stretch how (families.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from loongjax.errors import ModelError
from loongjax.models.config import RopeConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Frequencies:
    """Angle per position of each pair of dimensions [rad], and the scale of cos and sin."""

    inverse: np.ndarray  # float32 [D/2]
    attention_factor: float


class Rotation(NamedTuple):
    """cos and sin of T tokens for the D/2 pairs of a head, float32, attention factor included."""

    cos_TxE: Float[Array, "T E"]
    sin_TxE: Float[Array, "T E"]


def frequencies(rope: RopeConfig, head_dim: int) -> Frequencies:
    """The frequencies of a head of `head_dim` dimensions.

    Raises ModelError when `llama3` or `yarn` lack the original context.
    """
    inverse = 1 / _wavelengths(rope.base, head_dim)
    match rope.type:
        case "default":
            return Frequencies(inverse=inverse, attention_factor=1.0)
        case "linear":
            inverse = inverse / np.float32(rope.factor)
            return Frequencies(inverse=inverse, attention_factor=1.0)
        case "llama3":
            return Frequencies(inverse=_llama3(rope, inverse), attention_factor=1.0)
        case "yarn":
            return Frequencies(
                inverse=_yarn(rope, head_dim), attention_factor=_yarn_attention_factor(rope)
            )


def rotation_at(rope: RopeConfig, head_dim: int, positions_T: Int[Array, " T"]) -> Rotation:
    """The rotation of tokens at these positions, for `rotate`; the same in every layer."""
    freq = frequencies(rope, head_dim)
    angles_TxE = positions_T.astype(jnp.float32)[:, None] * freq.inverse
    return Rotation(
        cos_TxE=jnp.cos(angles_TxE) * np.float32(freq.attention_factor),
        sin_TxE=jnp.sin(angles_TxE) * np.float32(freq.attention_factor),
    )


def rotate(
    x_TxHxD: Float[Array, "T H D"],
    cos_TxE: Float[Array, "T D//2"],
    sin_TxE: Float[Array, "T D//2"],
) -> Float[Array, "T H D"]:
    """Rotates queries or keys: dimension i is paired with i + D/2, as in HF checkpoints."""
    first_TxHxE, second_TxHxE = jnp.split(x_TxHxD.astype(jnp.float32), 2, axis=-1)
    cos_Tx1xE, sin_Tx1xE = cos_TxE[:, None], sin_TxE[:, None]
    rotated_TxHxD = jnp.concatenate(
        [
            first_TxHxE * cos_Tx1xE - second_TxHxE * sin_Tx1xE,
            second_TxHxE * cos_Tx1xE + first_TxHxE * sin_Tx1xE,
        ],
        axis=-1,
    )
    return rotated_TxHxD.astype(x_TxHxD.dtype)


def _wavelengths(base: float, head_dim: int) -> np.ndarray:
    """Powers base ** (2i / D), float32: positions per radian of each pair.

    The power is taken in float64 and rounded once. numpy's own float32 power is off by one
    unit in the last place for 1 value in 6, which at position 1e6 turns by 0.06 rad.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths: np.ndarray = np.power(base, exponents.astype(np.float64))
    return wavelengths.astype(np.float32)


def _original_context(rope: RopeConfig) -> int:
    if rope.original_max_position is None:
        raise ModelError(f"RoPE type {rope.type!r} needs original_max_position in RopeConfig")
    return rope.original_max_position


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Long waves are stretched, short ones kept, those between interpolated."""
    original = _original_context(rope)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wave = 2 * math.pi / inverse
    smooth = (original / wave - low) / (high - low)
    between = (1 - smooth) * inverse / rope.factor + smooth * inverse
    stretched = np.where(wave > original / low, inverse / rope.factor, between)
    return np.where(wave < original / high, inverse, stretched)


def _yarn(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Fast dimensions are kept, slow ones stretched, with a linear ramp between."""
    wavelengths = _wavelengths(rope.base, head_dim)
    low, high = (_yarn_edge(rope, head_dim, beta) for beta in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    inverse: np.ndarray = 1 / (rope.factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept
    return inverse


def _yarn_edge(rope: RopeConfig, head_dim: int, rotations: float) -> float:
    """The dimension that turns so many times over the original context."""
    turns = math.log(_original_context(rope) / (rotations * 2 * math.pi))
    return head_dim * turns / (2 * math.log(rope.base))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
