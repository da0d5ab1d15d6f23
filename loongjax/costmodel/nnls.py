"""Least squares with coefficients that cannot be negative: times do not shrink with work."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_EPSILON = 1e-10


def nnls(
    matrix: Float[np.ndarray, "rows columns"], target: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " columns"]:
    """The x >= 0 that minimises |matrix @ x - target|, by the active-set method of Lawson
    and Hanson ("Solving Least Squares Problems", 1974, chapter 23).

    Columns are scaled to unit length first, so that units of coefficients may differ by many
    orders of magnitude. A column of zeros gets the coefficient 0.
    """
    lengths = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(lengths > 0, lengths, 1.0)
    columns = matrix.shape[1]
    x = np.zeros(columns)
    free = np.zeros(columns, bool)
    tolerance = _EPSILON * max(float(np.linalg.norm(target)), np.finfo(float).tiny)
    for _ in range(10 * columns + 10):  # three times the columns is usual
        slope = np.where(free, -np.inf, scaled.T @ (target - scaled @ x))
        best = int(np.argmax(slope))
        if free.all() or slope[best] <= tolerance:
            break
        free[best] = True
        x = _settle(scaled, target, x, free)
    return x / np.where(lengths > 0, lengths, 1.0)


def _settle(
    matrix: Float[np.ndarray, "rows columns"],
    target: Float[np.ndarray, " rows"],
    x: Float[np.ndarray, " columns"],
    free: np.ndarray,
) -> Float[np.ndarray, " columns"]:
    """The least squares over the free columns; those that would turn negative are freed no
    more (`free` is changed).
    """
    while True:
        wanted = np.zeros_like(x)
        wanted[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        negative = free & (wanted <= 0)
        if not negative.any():
            return wanted
        way = np.maximum(x[negative] - wanted[negative], np.finfo(float).tiny)
        reach = x[negative] / way
        x = x + float(reach.min()) * (wanted - x)
        free &= ~(negative & (x <= _EPSILON * max(1.0, float(np.abs(x).max()))))
        x = np.where(free, x, 0.0)
        if not free.any():
            return x
