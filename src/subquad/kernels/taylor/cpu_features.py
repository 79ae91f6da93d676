"""What the passes of the Taylor kernel share: the features of a chunk, their gradient, and the polynomial of scores."""

import numpy as np
from numba import njit

from subquad.kernels.numba_math import FASTMATH

_ROOT_HALF = np.float32(2**-0.5)


@njit(fastmath=FASTMATH)
def load_features(x, width, count, scale, phi):
    """``phi (F, count)`` of ``x (width, count)``, in the layout of ``subquad.kernels.taylor.features``."""
    linear = np.float32(np.sqrt(scale))
    for c in range(count):
        phi[0, c] = np.float32(1)
    for i in range(width):
        for c in range(count):
            phi[1 + i, c] = linear * x[i, c]
    place = 1 + width
    for i in range(width):
        for j in range(i, width):
            factor = scale * _ROOT_HALF if i == j else scale
            left, right, row = x[i], x[j], phi[place]
            for c in range(count):
                row[c] = factor * left[c] * right[c]
            place += 1


@njit(fastmath=FASTMATH)
def add_feature_gradient(x, width, count, scale, grad_phi, grad_x):
    """``grad_x (width, count)`` grows by the gradient that ``grad_phi (F, count)`` sends through the features."""
    linear = np.float32(np.sqrt(scale))
    for i in range(width):
        for c in range(count):
            grad_x[i, c] += linear * grad_phi[1 + i, c]
    place = 1 + width
    for i in range(width):
        for j in range(i, width):
            factor = scale * _ROOT_HALF if i == j else scale
            row = grad_phi[place]
            for c in range(count):
                grad_x[i, c] += factor * row[c] * x[j, c]
            for c in range(count):
                grad_x[j, c] += factor * row[c] * x[i, c]
            place += 1


@njit(fastmath=FASTMATH)
def polynomial(scores, rows, scale):
    """Products of rows become weights ``1 + s + s^2 / 2`` up to the diagonal, zero above it."""
    half, one = np.float32(0.5), np.float32(1)
    for i in range(rows):
        row = scores[i]
        for j in range(i + 1):
            s = scale * row[j]
            row[j] = one + s * (one + half * s)
        for j in range(i + 1, rows):
            row[j] = np.float32(0)


@njit(fastmath=FASTMATH)
def polynomial_gradient(scores, grad_weights, rows, scale):
    """``grad_weights`` becomes the gradient of the products, ``scores`` the weights."""
    half, one = np.float32(0.5), np.float32(1)
    for i in range(rows):
        row, grad = scores[i], grad_weights[i]
        for j in range(i + 1):
            s = scale * row[j]
            grad[j] *= scale * (one + s)
            row[j] = one + s * (one + half * s)
        for j in range(i + 1, rows):
            row[j] = np.float32(0)
            grad[j] = np.float32(0)
