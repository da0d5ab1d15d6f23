from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.costmodel.nnls import nnls


def brute_force(matrix: np.ndarray, target: np.ndarray) -> float:
    """The least squared error over all sets of columns whose free solution is not negative."""
    best = float(target @ target)
    for size in range(1, matrix.shape[1] + 1):
        for chosen in combinations(range(matrix.shape[1]), size):
            part = matrix[:, chosen]
            x = np.linalg.lstsq(part, target, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.sum((part @ x - target) ** 2)))
    return best


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 5))
def test_it_is_as_good_as_the_best_of_all_sets(seed, rows, columns):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-6, 7, columns)
    target = rng.normal(size=rows)
    x = nnls(matrix, target)
    assert (x >= 0).all()
    error = float(np.sum((matrix @ x - target) ** 2))
    assert error <= brute_force(matrix, target) + 1e-8 * float(target @ target)


def test_exact_coefficients_come_back():
    rng = np.random.default_rng(0)
    wanted = np.array([3.0, 0.0, 2e-9, 0.5])
    matrix = rng.uniform(0.1, 1.0, (12, 4)) * [1.0, 1.0, 1e9, 1.0]
    np.testing.assert_allclose(nnls(matrix, matrix @ wanted), wanted, rtol=1e-6, atol=1e-9)


def test_columns_of_zeros_and_equal_columns_do_no_harm():
    matrix = np.array([[0.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    x = nnls(matrix, np.array([3.0, 6.0]))
    assert x[0] == 0.0
    assert x[1] + x[2] == pytest.approx(3.0)
