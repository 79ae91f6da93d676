"""One token through the parts between a mixer's projections, on states that change in place.

Caches of other libraries keep a convolution's last inputs as ``(B, C, K)``, the state of Mamba as ``(B, D, N)``, of
Mamba-2 as ``(B, H, P, N)`` and of the delta rule as ``(B, H, K, V)``, and update them where they lie. Arguments are
addresses of float32 memory; rows of a batch may lie apart (``stride``), states and results are contiguous. Shapes are
checked by the caller. Importing this module imports numba.
"""

import math

import numpy as np
from numba import njit

from subquad.kernels.numba_math import exp32
from subquad.kernels.steps.pieces import PIECE, array_at, sigmoid32, softplus32

KERNEL = {**PIECE, "nogil": True, "cache": True}
LARGEST_PLAIN_STEP = np.float32(20)  # beyond it softplus is the identity, as in torch


@njit(**PIECE)
def step_of(logit):
    return logit if logit > LARGEST_PLAIN_STEP else softplus32(logit)


@njit(**PIECE)
def strided(address, rows, stride, width):
    """``(rows, stride)`` of which the first ``width`` columns may be read; the last row may end with them."""
    return array_at(address, (rows, width if rows == 1 else stride))


@njit(**KERNEL)
def convolve(x, stride, state, taps, bias, out, rows, channels, width, kept, silu):
    """``x (rows, channels)`` enters ``state (rows, channels, kept)``; ``out`` is its convolution with ``taps``.

    ``taps (channels, width)``, ``bias (channels,)`` or 0; ``kept >= width - 1``.
    """
    x, state = strided(x, rows, stride, channels), array_at(state, (rows, channels, kept))
    taps, out = array_at(taps, (channels, width)), array_at(out, (rows, channels))
    shift = array_at(bias, (channels if bias != 0 else 0,))
    first = kept - width + 1
    for b in range(rows):
        for c in range(channels):
            newest = x[b, c]
            total = newest * taps[c, width - 1]
            for w in range(width - 1):
                total += state[b, c, first + w] * taps[c, w]
            for w in range(kept - 1):
                state[b, c, w] = state[b, c, w + 1]
            state[b, c, kept - 1] = newest
            out[b, c] = total
        if shift.shape[0] > 0:
            for c in range(channels):
                out[b, c] += shift[c]
        if silu:
            for c in range(channels):
                out[b, c] *= sigmoid32(out[b, c])


@njit(**KERNEL)
def selective_scan(
    u, u_stride, logits, logit_stride, rates, logarithms, write, read, map_stride, skip, bias, gate, gate_stride,
    state, out, rows, channels, states,
):  # fmt: skip
    """Mamba's step: ``u, logits, gate (rows, channels)``, ``write, read (rows, states)`` with ``map_stride``.

    ``rates (channels, states)`` is A, or with ``logarithms`` the logarithm of -A. ``bias`` and ``gate`` may be 0.
    """
    u, logits = strided(u, rows, u_stride, channels), strided(logits, rows, logit_stride, channels)
    rates, state = array_at(rates, (channels, states)), array_at(state, (rows, channels, states))
    write, read = strided(write, rows, map_stride, states), strided(read, rows, map_stride, states)
    skip, out = array_at(skip, (channels,)), array_at(out, (rows, channels))
    bias = array_at(bias, (channels if bias != 0 else 0,))
    gates = strided(gate, rows, gate_stride, channels if gate != 0 else 0)
    rate, steps = np.empty(states, np.float32), np.empty(channels, np.float32)
    for b in range(rows):
        for c in range(channels):
            steps[c] = step_of(logits[b, c] + (bias[c] if bias.shape[0] > 0 else np.float32(0)))
        for c in range(channels):
            step, inner = steps[c], u[b, c]
            if logarithms:
                for n in range(states):
                    rate[n] = -exp32(rates[c, n])
            else:
                for n in range(states):
                    rate[n] = rates[c, n]
            total, amount = np.float32(0), step * inner
            for n in range(states):
                new = exp32(step * rate[n]) * state[b, c, n] + amount * write[b, n]
                state[b, c, n] = new
                total += new * read[b, n]
            out[b, c] = total + skip[c] * inner
        if gate != 0:
            for c in range(channels):
                out[b, c] *= gates[b, c] * sigmoid32(gates[b, c])


@njit(**KERNEL)
def ssd(
    x, x_stride, logits, logit_stride, rates, logarithms, write, write_stride, read, read_stride, skip, bias,
    state, out, rows, heads, width, groups, states,
):  # fmt: skip
    """Mamba-2's step: ``x (rows, heads, width)``, ``logits (rows, heads)``, ``write, read (rows, groups, states)``."""
    x, logits = strided(x, rows, x_stride, heads * width), strided(logits, rows, logit_stride, heads)
    rates, skip = array_at(rates, (heads,)), array_at(skip, (heads,))
    write = strided(write, rows, write_stride, groups * states)
    read = strided(read, rows, read_stride, groups * states)
    bias = array_at(bias, (heads if bias != 0 else 0,))
    state, out = array_at(state, (rows, heads, width, states)), array_at(out, (rows, heads, width))
    for b in range(rows):
        for h in range(heads):
            step = step_of(logits[b, h] + (bias[h] if bias.shape[0] > 0 else np.float32(0)))
            decay = exp32(step * (-exp32(rates[h]) if logarithms else rates[h]))
            at = h // (heads // groups) * states
            for p in range(width):
                inner, total = x[b, h * width + p], np.float32(0)
                amount = step * inner
                for n in range(states):
                    new = decay * state[b, h, p, n] + amount * write[b, at + n]
                    state[b, h, p, n] = new
                    total += new * read[b, at + n]
                out[b, h, p] = total + skip[h] * inner


@njit(**KERNEL)
def delta_gates(a, a_stride, b, b_stride, rates, bias, largest, log_decay, beta, rows, heads):
    """``log_decay = -exp(rates) softplus(a + bias)`` and ``beta = largest sigmoid(b)`` of ``a, b (rows, heads)``."""
    a, b = strided(a, rows, a_stride, heads), strided(b, rows, b_stride, heads)
    rates, bias = array_at(rates, (heads,)), array_at(bias, (heads,))
    log_decay, beta = array_at(log_decay, (rows, heads)), array_at(beta, (rows, heads))
    for row in range(rows):
        for h in range(heads):
            log_decay[row, h] = -exp32(rates[h]) * step_of(a[row, h] + bias[h])
            beta[row, h] = np.float32(largest) * sigmoid32(b[row, h])


@njit(**KERNEL)
def delta(
    q, q_stride, k, k_stride, v, v_stride, log_decay, per_channel, beta, state, out,
    rows, key_heads, heads, width, columns, normalize,
):  # fmt: skip
    """The gated delta rule's step: ``q, k (rows, key_heads, width)``, ``v (rows, heads, columns)``.

    ``log_decay (rows, heads)``, or ``(rows, heads, width)`` if ``per_channel``; ``beta (rows, heads)``. The output is
    scaled by ``width^-1/2``; ``normalize`` makes q and k unit vectors first.
    """
    q, k = strided(q, rows, q_stride, key_heads * width), strided(k, rows, k_stride, key_heads * width)
    v, beta = strided(v, rows, v_stride, heads * columns), array_at(beta, (rows, heads))
    gates = width if per_channel else 1
    log_decay = array_at(log_decay, (rows, heads, gates))
    state, out = array_at(state, (rows, heads, width, columns)), array_at(out, (rows, heads, columns))
    query, key = np.empty(width, np.float32), np.empty(width, np.float32)
    decays, error = np.empty(width, np.float32), np.empty(columns, np.float32)
    scale = np.float32(1 / math.sqrt(width))
    for b in range(rows):
        for h in range(heads):
            at = h // (heads // key_heads) * width
            query_factor, key_factor = scale, np.float32(1)
            if normalize:
                squares, key_squares = np.float32(0), np.float32(0)
                for a in range(width):
                    squares += q[b, at + a] * q[b, at + a]
                    key_squares += k[b, at + a] * k[b, at + a]
                query_factor = scale / np.float32(math.sqrt(squares + np.float32(1e-6)))
                key_factor = np.float32(1) / np.float32(math.sqrt(key_squares + np.float32(1e-6)))
            for a in range(width):
                query[a], key[a] = query_factor * q[b, at + a], key_factor * k[b, at + a]
                decays[a] = exp32(log_decay[b, h, a if per_channel else 0])
            error[:] = 0
            for a in range(width):
                factor = key[a] * decays[a]
                for c in range(columns):
                    error[c] += factor * state[b, h, a, c]
            for c in range(columns):
                error[c] = beta[b, h] * (v[b, h * columns + c] - error[c])
                out[b, h, c] = 0
            for a in range(width):
                factor, reading, decay = key[a], query[a], decays[a]
                for c in range(columns):
                    state[b, h, a, c] = decay * state[b, h, a, c] + factor * error[c]
                for c in range(columns):
                    out[b, h, c] += reading * state[b, h, a, c]
