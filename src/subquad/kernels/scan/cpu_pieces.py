"""What the forward and the backward pass of the selective scan on a CPU share: loading a block, softplus."""

import numpy as np
from numba import njit

from subquad.kernels.numba_math import FASTMATH, exp32
from subquad.kernels.scan.cpu_vectors import CHANNELS, LOG2_E

# log(1 + y) = 2 atanh(y / (2 + y)), an odd series; at y = 1 the first term left out is 2 / (17 3^17) = 1e-9
_S3, _S5, _S7, _S9, _S11, _S13, _S15 = (np.float32(2 / n) for n in range(3, 17, 2))


@njit
def padded_channels(count):
    """``count`` rounded up to what the inner loops take at once."""
    return (count + CHANNELS - 1) // CHANNELS * CHANNELS


@njit(fastmath=FASTMATH, error_model="numpy")
def softplus32(x):
    """``log(1 + e^x)`` with a relative error of a few roundings, at -80 too; vectorises, as log1p does not."""
    small = exp32(-abs(x))
    s = small / (np.float32(2) + small)
    q = s * s
    series = ((((((_S15 * q + _S13) * q + _S11) * q + _S9) * q + _S7) * q + _S5) * q + _S3) * q + np.float32(2)
    return (x if x > 0 else np.float32(0)) + s * series


@njit(fastmath=FASTMATH, error_model="numpy")
def load_steps(delta, delta_bias, row, left, count, steps):
    """The steps of a token's ``count`` channels from ``left`` on: as given, or softplus of logits with a bias."""
    given = delta[row, left : left + count]
    if delta_bias.shape[0] > 0:
        for c in range(count):
            steps[c] = softplus32(given[c] + delta_bias[left + c])
    else:
        steps[:count] = given


@njit
def load_rates(A, left, count, rate):
    """``A / ln 2`` of a block, transposed, zero in the padding: decays become powers of 2."""
    for n in range(A.shape[1]):
        for c in range(count):
            rate[n, c] = A[left + c, n] * LOG2_E
        rate[n, count:] = 0


@njit
def load_state(source, sequence, left, count, state):
    """A block of ``source (sequences, channels, states)``, transposed, zero where there is none."""
    state[:] = 0
    if source.shape[0] > 0:
        for n in range(source.shape[2]):
            for c in range(count):
                state[n, c] = source[sequence, left + c, n]


@njit
def store_state(state, target, sequence, left, count):
    for n in range(target.shape[2]):
        for c in range(count):
            target[sequence, left + c, n] = state[n, c]
