"""Building blocks of the numba kernels against numpy in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from subquad.kernels import numba_math

EPSILON = 2.0**-24


@njit
def multiply(transposed, m, n, k, alpha, a, b, accumulate, c):
    numba_math.multiply(transposed, m, n, k, np.float32(alpha), a, b, accumulate, c)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 20), n=st.integers(1, 50), k=st.integers(0, 40), transposed=st.booleans(),
    accumulate=st.booleans(), alpha=st.sampled_from([1.0, -1.0, 0.5]), spare=st.integers(0, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_multiply_equals_numpy_and_touches_nothing_else(m, n, k, transposed, accumulate, alpha, spare, seed):
    random = np.random.default_rng(seed)
    a = random.standard_normal((k + 1, m + spare) if transposed else (m, k + 1 + spare), dtype=np.float32)
    b = random.standard_normal((k + 1, n + spare), dtype=np.float32)
    c = random.standard_normal((m + spare, n + spare), dtype=np.float32)
    if not accumulate:
        c[:m, :n] = np.nan  # must not be read
    left = (a[:k, :m].T if transposed else a[:m, :k]).astype(float)
    expected = c.astype(float)
    expected[:m, :n] = alpha * (left @ b[:k, :n].astype(float)) + (expected[:m, :n] if accumulate else 0)
    multiply(transposed, m, n, k, alpha, a, b, accumulate, c)
    assert np.array_equal(c[m:], expected[m:])
    assert np.array_equal(c[:, n:], expected[:, n:])
    # At most k + 2 roundings of terms whose sizes add up to |a| |b| + |c|.
    size = np.abs(left) @ np.abs(b[:k, :n]) + (np.abs(expected[:m, :n]) if accumulate else 0) + 1e-30
    assert (np.abs(c[:m, :n] - expected[:m, :n]) <= 2 * (k + 2) * EPSILON * size).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 8), (16, 24), (7, 30), (33, 9)])
def test_transpose(rows, columns):
    source = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    target = np.zeros((columns, rows + 2), np.float32)
    numba_math.transpose(source, rows, columns, target)
    assert np.array_equal(target[:, :rows], source.T)
    assert not target[:, rows:].any()


@njit(fastmath=numba_math.FASTMATH)
def exponentials(x, y):
    for i in range(len(x)):
        y[i] = numba_math.exp32(x[i])


def test_exp32_within_two_units_and_its_edges():
    x = np.concatenate([np.linspace(-87, 88, 200_001), [0.0, -1e-9, 1e-9]]).astype(np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    assert np.abs(y / np.exp(x.astype(float)) - 1).max() < 2e-7
    edges = np.array([-np.inf, -1e30, -87.5, np.nan, 0.0], np.float32)
    y = np.empty_like(edges)
    exponentials(edges, y)
    assert np.array_equal(y, np.array([0, 0, 0, np.nan, 1], np.float32), equal_nan=True)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 31, 32])
@pytest.mark.parametrize("columns", [16, 48])
@pytest.mark.parametrize("transposed", [False, True])
def test_triangular_solves_read_only_below_the_diagonal(rows, columns, transposed):
    random = np.random.default_rng(rows)
    triangle = np.full((rows, rows + 3), np.nan, np.float32)
    below = np.tril_indices(rows, -1)
    triangle[below] = random.uniform(-0.5, 0.5, len(below[0]))
    values = random.standard_normal((rows + 1, columns + 16), dtype=np.float32)
    matrix = np.eye(rows)
    matrix[below] = triangle[below]
    expected = values.astype(float)
    expected[:rows, :columns] = np.linalg.solve(matrix.T if transposed else matrix, expected[:rows, :columns])
    solve = numba_math.solve_unit_lower_transposed if transposed else numba_math.solve_unit_lower
    solve(triangle, values, rows, columns)
    # Backward error of substitution: rows x eps relative to |matrix| |solution|, carried through the inverse.
    growth = np.abs(np.linalg.inv(matrix)).sum(1).max() * np.abs(matrix).sum(1).max()
    assert np.abs(values - expected).max() <= 4 * rows * EPSILON * growth * np.abs(expected).max()


def test_repeated_keys_with_reflections_are_solved_exactly():
    """The inverse of I + L with 2 everywhere below the diagonal alternates between 2 and -2, whole numbers."""
    rows = 32
    triangle = np.tril(np.full((rows, rows), 2, np.float32), -1)
    values = np.zeros((rows, 16), np.float32)
    values[0] = 1
    numba_math.solve_unit_lower(triangle, values, rows, 16)
    expected = np.array([1] + [2 * (-1) ** i for i in range(1, rows)], np.float32)
    assert np.array_equal(values[:, 0], expected)
