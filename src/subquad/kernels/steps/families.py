"""One-token kernels of the mixers: each fills an output and a new state, and changes nothing else.

``x (B, D)``, states and results come as addresses of contiguous float32 memory, checked by the caller. A layer comes as
the plain tuple of one of :mod:`.layouts` (numba takes that faster than a named one). What a layer does not have is an
empty array. Kernels return whether a gate lay outside its range: then what they filled is not to be used. The state is
updated and read by the step of the shared recurrence, :mod:`subquad.kernels.recurrence.cpu_step`, or that of the
selective scan. Importing this module imports numba.
"""

import math

import numpy as np
from numba import njit

from subquad.kernels.numba_math import exp32
from subquad.kernels.recurrence.cpu_step import step_into
from subquad.kernels.scan.cpu import step_rows
from subquad.kernels.steps import layouts
from subquad.kernels.steps.pieces import (
    PIECE,
    array_at,
    convolve,
    count,
    integers_at,
    l2_normalize,
    layer_norm,
    log_sigmoid32,
    multiply,
    project,
    project_into,
    rms_norm,
    rotate,
    sigmoid,
    sigmoid32,
    silu,
    simple_rms_norm,
    softplus32,
    spread_heads,
)

KERNEL = {**PIECE, "nogil": True, "cache": True}


@njit(**KERNEL)
def lightning(layer, batch, x, state, seen, output, after, seen_after):
    layer = layouts.Lightning(*layer)
    x = array_at(x, (batch, layer.q.shape[1]))
    q, k, v = project(x, layer.q), project(x, layer.k), project(x, layer.v)
    silu(q)
    silu(k)
    if layer.silu_values:
        silu(v)
    log_decay, beta = (-layer.slope).reshape((1, -1, 1)), np.empty((0, 0, 0), np.float32)
    o, outside = recur(q, k, v, log_decay, beta, layer.heads, layer.width, layer.width, state, after, 1.0)
    if layer.norm == layouts.LAYER:
        layer_norm(o, layer.norm_weight, layer.norm_bias, layer.norm_eps)
    elif layer.norm == layouts.RMS:
        rms_norm(o, layer.norm_weight, layer.norm_eps)
    elif layer.norm == layouts.SIMPLE_RMS:
        simple_rms_norm(o, layer.norm_eps)
    if layer.gate.shape[0] > 0:
        gate = project(x, layer.gate)
        if layer.gate_high.shape[0] > 0:
            gate = project(gate, layer.gate_high)
            sigmoid(gate)
        multiply(o, gate)
    project_into(o, layer.o, array_at(output, x.shape))
    count(seen, seen_after, batch)
    return outside


@njit(**KERNEL)
def retention(layer, batch, x, state, seen, output, after, seen_after, positions):
    layer = layouts.Retention(*layer)
    x = array_at(x, (batch, layer.q.shape[1]))
    q, k, v = project(x, layer.q), project(x, layer.k), project(x, layer.v)
    positions = integers_at(positions, batch)
    rotate(q.reshape((batch, layer.heads, layer.width)), positions, layer.rates)
    rotate(k.reshape((batch, layer.heads, layer.width)), positions, layer.rates)
    log_decay, beta = (-layer.slope).reshape((1, -1, 1)), np.empty((0, 0, 0), np.float32)
    o, outside = recur(
        q, k, v, log_decay, beta, layer.heads, layer.width, layer.columns, state, after, layer.width**-0.5
    )
    rms_norm(o, layer.norm_weight, layer.norm_eps)
    finish(x, o, layer.gate, layer.o, output)
    count(seen, seen_after, batch)
    return outside


@njit(**KERNEL)
def gla(layer, batch, x, state, q_tail, k_tail, v_tail, output, after, q_after, k_after, v_after):
    layer = layouts.GLA(*layer)
    x = array_at(x, (batch, layer.q.shape[1]))
    q, k, v = project(x, layer.q), project(x, layer.k), project(x, layer.v)
    if layer.q_taps.shape[0] > 0:
        convolve(q, layer.q_taps, q_tail, q_after)
        convolve(k, layer.k_taps, k_tail, k_after)
        convolve(v, layer.v_taps, v_tail, v_after)
        silu(q)
        silu(k)
        silu(v)
    forget = project(project(x, layer.forget_low), layer.forget_high)
    for b in range(batch):
        for c in range(forget.shape[1]):
            forget[b, c] = log_sigmoid32(forget[b, c] + layer.forget_bias[c]) / np.float32(layer.temperature)
    log_decay, beta = spread_heads(forget, layer.heads, layer.width), np.empty((0, 0, 0), np.float32)
    o, outside = recur(
        q, k, v, log_decay, beta, layer.heads, layer.width, layer.columns, state, after, layer.width**-0.5
    )
    rms_norm(o, layer.norm_weight, layer.norm_eps)
    finish(x, o, layer.gate, layer.o, output)
    return outside


@njit(**KERNEL)
def delta(layer, batch, x, state, q_tail, k_tail, v_tail, output, after, q_after, k_after, v_after):
    layer = layouts.Delta(*layer)
    heads = layer.heads
    x = array_at(x, (batch, layer.q.shape[1]))
    q, k, v = project(x, layer.q), project(x, layer.k), project(x, layer.v)
    if layer.q_taps.shape[0] > 0:
        convolve(q, layer.q_taps, q_tail, q_after)
        convolve(k, layer.k_taps, k_tail, k_after)
        convolve(v, layer.v_taps, v_tail, v_after)
    silu(q)
    silu(k)
    silu(v)
    l2_normalize(q.reshape((-1, layer.width)), 1e-6)
    l2_normalize(k.reshape((-1, layer.width)), 1e-6)
    beta, decay = project(x, layer.beta), project(x, layer.forget)
    for b in range(batch):
        for h in range(heads):
            beta[b, h] = np.float32(layer.largest_beta) * sigmoid32(beta[b, h])
        for h in range(decay.shape[1]):
            rate = np.float32(math.exp(layer.forget_rate_log[h]))
            decay[b, h] = -rate * softplus32(decay[b, h] + layer.forget_bias[h])
    o, outside = recur(
        q,
        k,
        v,
        decay.reshape((batch if decay.size else 0, heads, 1)),
        beta.reshape((batch, 1, heads)),
        heads,
        layer.width,
        layer.columns,
        state,
        after,
        layer.width**-0.5,
    )
    rms_norm(o, layer.norm_weight, layer.norm_eps)
    finish(x, o, layer.gate, layer.o, output)
    return outside


@njit(**KERNEL)
def mamba(layer, batch, x, state, tail, output, after, tail_after):
    layer = layouts.Mamba(*layer)
    channels, states = layer.rate_log.shape
    x = array_at(x, (batch, layer.inner.shape[1]))
    inner = project(x, layer.inner)
    u, gate = inner[:, :channels].copy(), inner[:, channels:].copy()
    convolve(u, layer.taps, tail, tail_after)
    if layer.taps_bias.shape[0] > 0:
        for b in range(batch):
            for c in range(channels):
                u[b, c] += layer.taps_bias[c]
    silu(u)
    maps = project(u, layer.maps)
    rank = maps.shape[1] - 2 * states
    rate = np.empty((channels, states), np.float32)
    for c in range(channels):
        for n in range(states):
            rate[c, n] = -exp32(layer.rate_log[c, n])
    y = np.empty((batch, channels), np.float32)
    outside = step_rows(
        u,
        project(maps[:, :rank].copy(), layer.step),
        rate,
        maps[:, rank : rank + states].copy(),
        maps[:, rank + states :].copy(),
        layer.skip,
        layer.step_bias,
        gate,
        array_at(state, (batch, channels, states)),
        y,
        array_at(after, (batch, channels, states)),
        1,
    )
    project_into(y, layer.o, array_at(output, x.shape))
    return outside


@njit
def recur(q, k, v, log_decay, beta, heads, width, columns, state, after, scale):
    """The state's update and its read ``(B, H V)``; heads of q, k, v that are fewer than ``heads`` are shared."""
    batch = q.shape[0]
    o = np.empty((batch, heads * columns), np.float32)
    outside = step_into(
        spread_heads(q, heads, width),
        spread_heads(k, heads, width).reshape((batch, 1, heads, width)),
        spread_heads(v, heads, columns).reshape((batch, 1, heads, columns)),
        log_decay,
        beta,
        array_at(state, (batch, heads, width, columns)),
        o.reshape((batch, heads, columns)),
        array_at(after, (batch, heads, width, columns)),
        scale,
    )
    return o, outside


@njit
def finish(x, o, gate_weight, weight, output):
    """The output gate ``SiLU(W_g x)``, where there is one, and the output projection."""
    if gate_weight.shape[0] > 0:
        gate = project(x, gate_weight)
        silu(gate)
        multiply(o, gate)
    project_into(o, weight, array_at(output, (x.shape[0], weight.shape[0])))
