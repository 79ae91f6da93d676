"""Active neurons of few tokens on a CPU, in numba: each active row of the weights is read once, for all tokens.

One work item is one part of the list of active neurons, with a sum of its own; the parts are added in the end. Rows of
both weights must be contiguous, so the last matrix is held transposed, ``(F, D)``.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH

ROWS_PER_PART = 16  # at least: fewer are not worth a sum of their own


def gated_sum(x: Tensor, s: Tensor, up: Tensor, down: Tensor, active: Tensor, thresholds: Tensor) -> Tensor:
    """``sum_i h_i down_i`` over the active i, ``h_i = s_i (up_i . x)`` where ``|h_i| >= thresholds_i``, else 0.

    Args:
        x: ``(N, D)`` float32.
        s: ``(N, F)`` float32, the gate after its activation; 0 where a token does not use a neuron.
        up, down: ``(F, D)`` and ``(F, E)`` float32, contiguous.
        active: ``(M,)`` int64, the neurons with a value other than 0 for any token.
        thresholds: ``(F,)`` float32.

    Returns:
        ``(N, E)`` float32.
    """
    sums, arrays = _prepare(x.shape[0], down, active, x, s, up, down, active, thresholds)
    pool.run_over_items(lambda first, last: _gated_sums(first, last, *arrays, sums), sums.shape[0])
    return torch.from_numpy(sums).sum(0)


def down_sum(h: Tensor, down: Tensor, active: Tensor) -> Tensor:
    """``sum_i h_i down_i`` over the active i; h ``(N, F)``, down ``(F, E)``, both float32 and contiguous."""
    sums, arrays = _prepare(h.shape[0], down, active, h, down, active)
    pool.run_over_items(lambda first, last: _down_sums(first, last, *arrays, sums), sums.shape[0])
    return torch.from_numpy(sums).sum(0)


def _prepare(tokens: int, down: Tensor, active: Tensor, *tensors: Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
    most = pool.RANGES_PER_THREAD * torch.get_num_threads() if torch.get_num_threads() > 1 else 1
    parts = max(1, min(most, len(active) // ROWS_PER_PART))
    sums = np.zeros((parts, tokens, down.shape[1]), dtype=np.float32)
    return sums, [tensor.detach().contiguous().numpy() for tensor in tensors]


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def _gated_sums(first, last, x, s, up, down, active, thresholds, sums):
    parts = sums.shape[0]
    for part in range(first, last):
        for place in range(len(active) * part // parts, len(active) * (part + 1) // parts):
            neuron = active[place]
            for token in range(x.shape[0]):
                gate = s[token, neuron]
                if gate != 0:
                    product = np.float32(0)
                    for d in range(x.shape[1]):
                        product += up[neuron, d] * x[token, d]
                    product *= gate
                    if abs(product) >= thresholds[neuron]:
                        for e in range(down.shape[1]):
                            sums[part, token, e] += product * down[neuron, e]


@njit(nogil=True, cache=True, fastmath=FASTMATH)
def _down_sums(first, last, h, down, active, sums):
    parts = sums.shape[0]
    for part in range(first, last):
        for place in range(len(active) * part // parts, len(active) * (part + 1) // parts):
            neuron = active[place]
            for token in range(h.shape[0]):
                value = h[token, neuron]
                if value != 0:
                    for e in range(down.shape[1]):
                        sums[part, token, e] += value * down[neuron, e]
