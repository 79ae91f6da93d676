"""The short causal convolution on a CPU in numba, forward and backward, with the activation in the same pass.

``y_t = act(bias + sum_w weight[w] x_{t - W + 1 + w})`` per channel. In torch every tap is a pass over memory of its
own. Work items are runs of tokens (forward) and blocks of channels (backward, whose sums run over the tokens).
"""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH
from subquad.kernels.scan.cpu_layout import dense, rows, uninitialised
from subquad.kernels.steps.pieces import sigmoid32

#: Tokens of one item of the forward pass, channels of one item of the backward pass.
TOKENS, CHANNELS = 64, 128


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool) -> tuple[Tensor]:
    """``y (B, T, D)`` in x's dtype.

    ``x (B, T, D)``, ``weight (D, W)``, ``bias (D,)``, ``initial_state (B, W - 1, D)``: the tokens before, None: zeros.
    """
    batch, time, channels = x.shape
    y = uninitialised(batch, time, channels)
    pieces = -(-time // TOKENS)
    taps = np.ascontiguousarray(dense(weight, 2).T)
    arguments = (rows(x), taps, dense(bias, 1), dense(initial_state, 3), silu, pieces, y.numpy())
    pool.run_over_items(lambda first, last: _forward_items(first, last, *arguments), batch * pieces)
    return (y if y.dtype == x.dtype else y.to(x.dtype),)


@njit(fastmath=FASTMATH)
def _source(x, state, sequence, time, place, left, right):
    """The input at ``place`` of a sequence; a negative one lies in the state. None is given as an empty row."""
    if place >= 0:
        return x[sequence * time + place, left:right]
    if state.shape[0] > 0:
        return state[sequence, state.shape[1] + place, left:right]
    return x[0, :0]


@njit(fastmath=FASTMATH, error_model="numpy")
def _convolve(x, taps, bias, state, sequence, time, place, left, right, out):
    """Fill ``out`` with the channels ``left..right`` at one place, before the activation."""
    width = taps.shape[0]
    newest, tap = x[sequence * time + place, left:right], taps[width - 1, left:right]
    if bias.shape[0] > 0:
        shift = bias[left:right]
        for c in range(right - left):
            out[c] = shift[c] + tap[c] * newest[c]
    else:
        for c in range(right - left):
            out[c] = tap[c] * newest[c]
    for w in range(width - 1):
        source, tap = _source(x, state, sequence, time, place - width + 1 + w, left, right), taps[w, left:right]
        for c in range(source.shape[0]):
            out[c] += tap[c] * source[c]


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(first_item, last_item, x, taps, bias, state, silu, pieces, y):
    time, channels = y.shape[1], y.shape[2]
    for item in range(first_item, last_item):
        sequence, start = item // pieces, item % pieces * TOKENS
        for place in range(start, min(start + TOKENS, time)):
            out = y[sequence, place]
            _convolve(x, taps, bias, state, sequence, time, place, 0, channels, out)
            if silu:
                for c in range(channels):
                    out[c] *= sigmoid32(out[c])


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, silu: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and the initial state; empty for what is absent."""
    batch, time, channels = x.shape
    width = weight.shape[1]
    grad_x = uninitialised(batch, time, channels)
    grad_taps = uninitialised(batch, width, channels)
    grad_bias = uninitialised(batch, channels)
    grad_state = uninitialised(batch, width - 1, channels)
    blocks = -(-channels // CHANNELS)
    taps = np.ascontiguousarray(dense(weight, 2).T)
    arguments = (
        *(rows(grad_y), rows(x), taps, dense(bias, 1), dense(initial_state, 3), silu, blocks),
        *(grad_x.numpy(), grad_taps.numpy(), grad_bias.numpy(), grad_state.numpy()),
    )
    pool.run_over_items(lambda first, last: _backward_items(first, last, *arguments), batch * blocks)
    nothing = x.new_empty(0)
    return (
        grad_x.to(x.dtype),
        grad_taps.sum(0).T.contiguous().to(weight.dtype),
        nothing if bias is None else grad_bias.sum(0).to(bias.dtype),
        nothing.clone() if initial_state is None else grad_state.to(initial_state.dtype),
    )


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item,
    last_item,
    grad_y,
    x,
    taps,
    bias,
    state,
    silu,
    blocks,
    grad_x,
    grad_taps,
    grad_bias,
    grad_state,
):
    time, channels, width = grad_x.shape[1], grad_x.shape[2], taps.shape[0]
    before = width - 1
    out = np.empty(CHANNELS, np.float32)
    for item in range(first_item, last_item):
        sequence, left = item // blocks, item % blocks * CHANNELS
        right = min(left + CHANNELS, channels)
        count = right - left
        grad_taps[sequence, :, left:right] = 0
        grad_state[sequence, :, left:right] = 0
        shift = grad_bias[sequence, left:right]
        shift[:] = 0
        for place in range(time):
            upstream = grad_y[sequence * time + place, left:right]
            if silu:
                _convolve(x, taps, bias, state, sequence, time, place, left, right, out)
                for c in range(count):
                    s = sigmoid32(out[c])
                    out[c] = upstream[c] * s * (np.float32(1) + out[c] * (np.float32(1) - s))
            else:
                out[:count] = upstream
            for c in range(count):
                shift[c] += out[c]
            newest, tap = grad_x[sequence, place, left:right], taps[before, left:right]
            for c in range(count):
                newest[c] = tap[c] * out[c]
            for w in range(width):
                source = _source(x, state, sequence, time, place - before + w, left, right)
                of_tap = grad_taps[sequence, w, left:right]
                for c in range(source.shape[0]):
                    of_tap[c] += out[c] * source[c]
            for w in range(before):
                at, tap = place - before + w, taps[w, left:right]
                target = grad_x[sequence, at, left:right] if at >= 0 else grad_state[sequence, before + at, left:right]
                for c in range(count):
                    target[c] += tap[c] * out[c]
