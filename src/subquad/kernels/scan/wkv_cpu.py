"""RWKV-4's weighted average on a CPU in numba: blocks of channels side by side, in one pass over memory.

Numerator N, denominator D and maximum m of a channel, with p = e^{m_{t-1} - ...} for the past and q for the token::

    o_t = (p N + q v) / (p D + q) over max(m_{t-1}, u + k_t)      N, D, m by the same over max(m_{t-1} + w, k_t)

Backward: o does not change when N, D grow by a factor and m falls by its logarithm. So of the gradient of m only the
part ``excess = dm - dN N - dD D`` has to be carried, which a gradient of the last state alone brings in: it goes back
to the argument that the maximum was, and all else are gradients of N and D at a fixed m.
"""

import numpy as np
import numpy.typing as npt
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, exp32
from subquad.kernels.scan.cpu_layout import Array, blocks_of, dense, rows, sequence_starts, uninitialised

#: Most channels of a block. Backward keeps three numbers per token and channel of its block.
FORWARD_BLOCK, BACKWARD_BLOCK = 256, 128


def forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    time_first: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    maximum: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The average ``(B, T, D)`` in v's dtype and the last state, three of ``(N, D)`` float32.

    Shapes are checked by the caller, ``cu_seqlens (N + 1,)`` here.
    """
    batch, time, channels = k.shape
    starts = sequence_starts(batch, time, cu_seqlens)
    sequences = len(starts) - 1
    o = uninitialised(batch, time, channels)
    last = [uninitialised(sequences, channels) for _ in range(3)]
    blocks = blocks_of(channels, sequences, FORWARD_BLOCK)
    arguments = (
        *_operands(k, v, log_decay, time_first, numerator, denominator, maximum),
        *(starts, blocks, o.numpy().reshape(-1, channels), *(x.numpy() for x in last)),
    )
    pool.run_over_items(lambda first, end: _forward_items(first, end, *arguments), sequences * blocks)
    return o.to(v.dtype), last[0], last[1], last[2]


def _operands(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    time_first: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    maximum: Tensor,
) -> tuple[Array, ...]:
    states = (dense(x, 2) for x in (numerator, denominator, maximum))
    return rows(k), rows(v), dense(log_decay, 1), dense(time_first, 1), *states


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(first_item, last_item, k, v, w, u, num_0, den_0, max_0, starts, blocks, o, nums, dens, maxs):
    channels = o.shape[1]
    scratch = np.empty((3, channels // blocks + 1), np.float32)
    for item in range(first_item, last_item):
        sequence, left = item // blocks, channels * (item % blocks) // blocks
        right = channels * (item % blocks + 1) // blocks
        num, den, top = nums[sequence, left:right], dens[sequence, left:right], maxs[sequence, left:right]
        num[:], den[:] = num_0[sequence, left:right], den_0[sequence, left:right]
        top[:] = max_0[sequence, left:right]
        decay, bonus = w[left:right], u[left:right]
        less, past, now = scratch[0, : right - left], scratch[1, : right - left], scratch[2, : right - left]
        for t in range(starts[sequence], starts[sequence + 1]):
            key, value, out = k[t, left:right], v[t, left:right], o[t, left:right]
            _shares(top, key, bonus, np.float32(-1), less, past, now)
            for c in range(right - left):
                out[c] = (past[c] * num[c] + now[c] * value[c]) / (past[c] * den[c] + now[c])
            _take_in(key, value, decay, num, den, top, less, past, now)


# One array is written per loop: with more, there would be more checks for overlap than the compiler puts up with.


@njit(fastmath=FASTMATH, error_model="numpy")
def _shares(top, key, shift, sign, less, past, now):
    """``past, now = e^{a - max(a, b)}, e^{b - max(a, b)}`` for ``a - b = top + sign shift - key``: one exponential."""
    for c in range(key.shape[0]):
        less[c] = exp32(-abs(top[c] + sign * shift[c] - key[c]))
    for c in range(key.shape[0]):
        past[c] = less[c] if top[c] + sign * shift[c] < key[c] else np.float32(1)
    for c in range(key.shape[0]):
        now[c] = np.float32(1) if top[c] + sign * shift[c] < key[c] else less[c]


@njit(fastmath=FASTMATH, error_model="numpy")
def _take_in(key, value, decay, num, den, top, less, past, now):
    """The state after a token."""
    _shares(top, key, decay, np.float32(1), less, past, now)
    for c in range(key.shape[0]):
        num[c] = past[c] * num[c] + now[c] * value[c]
    for c in range(key.shape[0]):
        den[c] = past[c] * den[c] + now[c]
    for c in range(key.shape[0]):
        kept = top[c] + decay[c]
        top[c] = kept if kept >= key[c] else key[c]


def backward(
    grad_o: Tensor,
    grad_numerator: Tensor,
    grad_denominator: Tensor,
    grad_maximum: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    time_first: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    maximum: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of k, v, log_decay, time_first and of the three of the state. States are computed once more."""
    batch, time, channels = k.shape
    starts: npt.NDArray[np.int64] = sequence_starts(batch, time, cu_seqlens)
    sequences = len(starts) - 1
    grad_k, grad_v = uninitialised(*k.shape), uninitialised(*k.shape)
    small = [uninitialised(sequences, channels) for _ in range(5)]  # log_decay, time_first, and the state
    blocks = blocks_of(channels, sequences, BACKWARD_BLOCK)
    arguments = (
        *(rows(grad_o), *(dense(x, 2) for x in (grad_numerator, grad_denominator, grad_maximum))),
        *_operands(k, v, log_decay, time_first, numerator, denominator, maximum),
        *(starts, blocks, grad_k.numpy().reshape(-1, channels), grad_v.numpy().reshape(-1, channels)),
        *(x.numpy() for x in small),
    )
    pool.run_over_items(lambda first, end: _backward_items(first, end, *arguments), sequences * blocks)
    of_decay, of_first, *of_state = small
    return (
        *(grad_k.to(k.dtype), grad_v.to(v.dtype)),
        *(of_decay.sum(0).to(log_decay.dtype), of_first.sum(0).to(time_first.dtype)),
        *of_state,
    )


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item, last_item, grad_o, grad_nums, grad_dens, grad_maxs, k, v, w, u, num_0, den_0, max_0, starts, blocks,
    grad_k, grad_v, grad_w, grad_u, grad_num_0, grad_den_0, grad_max_0,
):  # fmt: skip
    channels, longest = grad_k.shape[1], 0
    for sequence in range(starts.shape[0] - 1):
        longest = max(longest, starts[sequence + 1] - starts[sequence])
    widest = channels // blocks + 1
    kept = np.empty((3, longest + 1, widest), np.float32)
    nums, dens, tops = kept[0], kept[1], kept[2]
    scratch = np.empty((7, widest), np.float32)
    for item in range(first_item, last_item):
        sequence, left = item // blocks, channels * (item % blocks) // blocks
        right = channels * (item % blocks + 1) // blocks
        begin, time, count = starts[sequence], starts[sequence + 1] - starts[sequence], right - left
        decay, bonus = w[left:right], u[left:right]
        less, past, now = scratch[0, :count], scratch[1, :count], scratch[2, :count]
        excess, o = scratch[3, :count], scratch[4, :count]
        share, step = scratch[5, :count], scratch[6, :count]
        nums[0, :count], dens[0, :count] = num_0[sequence, left:right], den_0[sequence, left:right]
        tops[0, :count] = max_0[sequence, left:right]
        for t in range(time):
            nums[t + 1], dens[t + 1], tops[t + 1] = nums[t], dens[t], tops[t]
            key, value = k[begin + t, left:right], v[begin + t, left:right]
            _take_in(key, value, decay, nums[t + 1], dens[t + 1], tops[t + 1], less, past, now)
        of_w, of_u = grad_w[sequence, left:right], grad_u[sequence, left:right]
        of_num, of_den = grad_num_0[sequence, left:right], grad_den_0[sequence, left:right]
        of_num[:], of_den[:] = grad_nums[sequence, left:right], grad_dens[sequence, left:right]
        of_w[:], of_u[:] = 0, 0
        for c in range(count):
            scaled = of_num[c] * nums[time, c] + of_den[c] * dens[time, c]
            excess[c] = grad_maxs[sequence, left + c] - scaled
        for t in range(time - 1, -1, -1):
            key, value = k[begin + t, left:right], v[begin + t, left:right]
            grad = grad_o[begin + t, left:right]
            of_key, of_value = grad_k[begin + t, left:right], grad_v[begin + t, left:right]
            num, den, top = nums[t], dens[t], tops[t]
            _shares(top, key, decay, np.float32(1), less, past, now)  # through the state
            for c in range(count):  # where the maximum came from: the past, the token, or both alike
                ahead = top[c] + decay[c] - key[c]
                step[c] = np.float32(1) if ahead > 0 else np.float32(0.5) if ahead == 0 else np.float32(0)
            for c in range(count):
                of_value[c] = now[c] * of_num[c]
            for c in range(count):
                of_key[c] = now[c] * (of_num[c] * value[c] + of_den[c]) + (1 - step[c]) * excess[c]
            for c in range(count):
                excess[c] *= step[c]
            for c in range(count):
                of_num[c] *= past[c]
            for c in range(count):
                of_den[c] *= past[c]
            for c in range(count):
                of_w[c] += of_num[c] * num[c] + of_den[c] * den[c] + excess[c]
            _shares(top, key, bonus, np.float32(-1), less, past, now)  # through the output
            for c in range(count):
                share[c] = 1 / (past[c] * den[c] + now[c])
            for c in range(count):
                o[c] = (past[c] * num[c] + now[c] * value[c]) * share[c]
            for c in range(count):
                share[c] *= grad[c]
            for c in range(count):
                now[c] *= share[c]
            for c in range(count):
                past[c] *= share[c]
            for c in range(count):
                of_value[c] += now[c]
            for c in range(count):
                step[c] = now[c] * (value[c] - o[c])
            for c in range(count):
                of_key[c] += step[c]
            for c in range(count):
                of_u[c] += step[c]
            for c in range(count):
                of_num[c] += past[c]
            for c in range(count):
                of_den[c] -= past[c] * o[c]
        for c in range(count):
            scaled = of_num[c] * nums[0, c] + of_den[c] * dens[0, c]
            grad_max_0[sequence, left + c] = excess[c] + scaled
