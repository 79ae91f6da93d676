"""The running log-sum-exp on a CPU: one exponential per token and channel, channels in vectors, tokens in order."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, exp32
from subquad.kernels.recurrence.checks import check_offsets

BLOCK = 128  # channels of one work item: a whole number of cache lines


def forward(k: Tensor, first: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """``z (B, T, C)`` and its last value ``(N, C)``; k ``(B, T, C)`` and first ``(N, C)`` contiguous float32."""
    starts, items = _items(k, cu_seqlens)
    channels = k.shape[2]
    maxima, sums = (torch.from_numpy(np.empty(k.shape, np.float32)) for _ in range(2))
    seen = first != -torch.inf
    last_maximum, last_sum = first.clone(), seen.to(torch.float32)
    arrays = [x.numpy().reshape(-1, channels) for x in (k, maxima, sums, last_maximum, last_sum)]
    pool.run_over_items(lambda a, b: _forward_items(a, b, starts, *arrays), items)
    return sums.log_().add_(maxima), last_sum.log_().add_(last_maximum)


def backward(
    grad_z: Tensor, grad_last: Tensor, k: Tensor, first: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of k and first. With R summed from the end, all factors at most 1::

    R_t = dz_t + e^{z_t - z_{t+1}} R_{t+1}        dk_t = e^{k_t - z_t} R_t        dz_0 = e^{z_0 - z_1} R_1
    """
    starts, items = _items(k, cu_seqlens)
    channels = k.shape[2]
    z, _ = forward(k, first, cu_seqlens)
    grad_k = torch.from_numpy(np.empty(k.shape, np.float32))
    grad_first = grad_last.clone()
    arrays = [x.numpy().reshape(-1, channels) for x in (grad_z, k, z, first, grad_k, grad_first)]
    pool.run_over_items(lambda a, b: _backward_items(a, b, starts, *arrays), items)
    return grad_k, grad_first


def _items(k: Tensor, cu_seqlens: Tensor | None) -> tuple[np.ndarray, int]:
    batch, time, channels = k.shape
    if cu_seqlens is None:
        starts = np.arange(batch + 1, dtype=np.int64) * time
    else:
        starts = np.asarray(check_offsets(cu_seqlens, time), dtype=np.int64)
    return starts, (len(starts) - 1) * -(-channels // BLOCK)


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(first_item, last_item, starts, k, maxima, sums, last_maximum, last_sum):
    channels = k.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    largest, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for item in range(first_item, last_item):
        sequence, left = item // blocks, item % blocks * BLOCK
        width = min(BLOCK, channels - left)
        for c in range(width):
            largest[c] = last_maximum[sequence, left + c]
            total[c] = last_sum[sequence, left + c]
        for token in range(starts[sequence], starts[sequence + 1]):
            scores = k[token, left : left + width]
            kept_maximum, kept_sum = maxima[token, left : left + width], sums[token, left : left + width]
            for c in range(width):
                x, m = scores[c], largest[c]
                weight = exp32(-abs(x - m))
                rises = x > m
                u = total[c] * (weight if rises else np.float32(1)) + (np.float32(1) if rises else weight)
                u = total[c] if x == -np.inf else u
                m = x if rises else m
                largest[c] = m
                total[c] = u
                kept_maximum[c] = m
                kept_sum[c] = u
        for c in range(width):
            last_maximum[sequence, left + c] = largest[c]
            last_sum[sequence, left + c] = total[c]


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(first_item, last_item, starts, grad_z, k, z, first, grad_k, grad_first):
    channels = k.shape[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    total, later = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    zero = np.float32(0)
    for item in range(first_item, last_item):
        sequence, left = item // blocks, item % blocks * BLOCK
        width = min(BLOCK, channels - left)
        begin, end = starts[sequence], starts[sequence + 1]
        for c in range(width):
            total[c] = grad_first[sequence, left + c]
            later[c] = z[end - 1, left + c] if begin < end else first[sequence, left + c]
        for token in range(end - 1, begin - 1, -1):
            upstream, scores = grad_z[token, left : left + width], k[token, left : left + width]
            mass, target = z[token, left : left + width], grad_k[token, left : left + width]
            for c in range(width):
                fade = zero if mass[c] == -np.inf else exp32(mass[c] - later[c])
                r = total[c] * fade + (zero if mass[c] == -np.inf else upstream[c])
                total[c] = r
                later[c] = mass[c]
                target[c] = zero if scores[c] == -np.inf else r * exp32(scores[c] - mass[c])
        for c in range(width):
            own = first[sequence, left + c]
            grad_first[sequence, left + c] = zero if own == -np.inf else total[c] * exp32(own - later[c])
