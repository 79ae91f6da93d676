"""The diagonal scan on a CPU in numba: blocks of channels side by side, in one pass over memory.

With g_t the gradient of h_t: ``g_t = dh_t + a_{t+1} g_{t+1}``, ``dx_t = g_t``, ``da_t = g_t h_{t-1}``,
``dh_0 = a_1 g_1``.
"""

import numpy as np
import numpy.typing as npt
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH
from subquad.kernels.scan.cpu_layout import Array, blocks_of, dense, rows, sequence_starts, uninitialised

#: Most channels of a block: a row of it is two kilobytes, which the memory streams.
BLOCK = 512


def forward(decay: Tensor, x: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """All states ``(B, T, D)`` in x's dtype and the last of each sequence ``(N, D)`` float32.

    ``decay, x (B, T, D)``; ``initial_state (N, D)``; shapes are checked by the caller, ``cu_seqlens (N + 1,)`` here.
    """
    starts = sequence_starts(x.shape[0], x.shape[1], cu_seqlens)
    h, last = _states(rows(decay), rows(x), dense(initial_state, 2), starts, x.shape)
    return h.to(x.dtype), last


def _states(
    decay: Array, x: Array, initial_state: Array, starts: npt.NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    sequences, channels = len(starts) - 1, shape[2]
    h, last = uninitialised(*shape), uninitialised(sequences, channels)
    blocks = blocks_of(channels, sequences, BLOCK)
    arguments = (decay, x, initial_state, starts, blocks, h.numpy().reshape(-1, channels), last.numpy())
    pool.run_over_items(lambda first, end: _forward_items(first, end, *arguments), sequences * blocks)
    return h, last


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(first_item, last_item, decay, x, initial_state, starts, blocks, h, last):
    channels = h.shape[1]
    for item in range(first_item, last_item):
        sequence, left = item // blocks, channels * (item % blocks) // blocks
        right = channels * (item % blocks + 1) // blocks
        state = last[sequence, left:right]
        state[:] = initial_state[sequence, left:right]
        for t in range(starts[sequence], starts[sequence + 1]):
            a, added, out = decay[t, left:right], x[t, left:right], h[t, left:right]
            for c in range(right - left):
                state[c] = a[c] * state[c] + added[c]
            out[:] = state


def backward(
    grad_h: Tensor, grad_last: Tensor, decay: Tensor, x: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of decay, x and the initial state. The states are computed once more rather than kept."""
    starts = sequence_starts(x.shape[0], x.shape[1], cu_seqlens)
    sequences, channels = len(starts) - 1, x.shape[2]
    decays, initial = rows(decay), dense(initial_state, 2)
    h, _ = _states(decays, rows(x), initial, starts, x.shape)
    grad_decay, grad_x = uninitialised(*x.shape), uninitialised(*x.shape)
    grad_initial = uninitialised(sequences, channels)
    blocks = blocks_of(channels, sequences, BLOCK)
    arguments = (
        *(rows(grad_h), dense(grad_last, 2), decays, initial, starts, blocks, h.numpy().reshape(-1, channels)),
        *(grad_decay.numpy().reshape(-1, channels), grad_x.numpy().reshape(-1, channels), grad_initial.numpy()),
    )
    pool.run_over_items(lambda first, end: _backward_items(first, end, *arguments), sequences * blocks)
    return grad_decay.to(decay.dtype), grad_x.to(x.dtype), grad_initial


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item, last_item, grad_h, grad_last, decay, initial_state, starts, blocks, h, grad_decay, grad_x, grad_initial
):
    channels = h.shape[1]
    for item in range(first_item, last_item):
        sequence, left = item // blocks, channels * (item % blocks) // blocks
        right = channels * (item % blocks + 1) // blocks
        grad = grad_initial[sequence, left:right]
        grad[:] = grad_last[sequence, left:right]
        for t in range(starts[sequence + 1] - 1, starts[sequence] - 1, -1):
            before = h[t - 1, left:right] if t > starts[sequence] else initial_state[sequence, left:right]
            a, upstream = decay[t, left:right], grad_h[t, left:right]
            of_decay, of_x = grad_decay[t, left:right], grad_x[t, left:right]
            for c in range(right - left):
                grad[c] += upstream[c]
            of_x[:] = grad
            for c in range(right - left):
                of_decay[c] = grad[c] * before[c]
            for c in range(right - left):
                grad[c] *= a[c]
