"""The selective scan on a CPU in numba: forward pass and one token.

Per channel d and state n (Gu and Dao 2023, equation 2, discretised as in section 3.6)::

    h_t[d,n] = e^{delta_t[d] A[d,n]} h_{t-1}[d,n] + delta_t[d] B_t[n] u_t[d]
    y_t[d] = sum_n C_t[n] h_t[d,n] + D[d] u_t[d]

With ``delta_bias``, delta comes as logits and becomes ``softplus(delta + delta_bias)``; with ``gate``, y is multiplied
by ``SiLU(gate)``: a whole pass over memory less for each. The state of a block lies as ``(N, channels)``, so that the
inner loops run over channels; :mod:`.cpu_vectors` has them.
"""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, exp32
from subquad.kernels.scan.cpu_backward import backward
from subquad.kernels.scan.cpu_layout import (
    CHUNK,
    FORWARD_BLOCK,
    Layout,
    absent_rows,
    dense,
    kept_states,
    rows,
    uninitialised,
)
from subquad.kernels.scan.cpu_pieces import load_rates, load_state, load_steps, padded_channels, store_state
from subquad.kernels.scan.cpu_vectors import advance
from subquad.kernels.steps.pieces import sigmoid32

__all__ = ["backward", "forward", "saved_shape", "step"]


def saved_shape(batch: int, time: int, channels: int, states: int, sequences: int) -> tuple[int, ...]:
    """Shape of what ``forward`` keeps for ``backward``: the state before every chunk but the first."""
    return kept_states(batch, time), states, channels


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y (B, T, D)`` in u's dtype, the last state ``(N, D, states)`` float32, and kept states if ``save``.

    ``u, delta, gate (B, T, D)``; ``A (D, states)``; ``B, C (B, T, groups, states)``; ``D, delta_bias (D,)``;
    ``initial_state (N, D, states)``, all float32, bfloat16 or float16, computed in float32. Shapes are checked by the
    caller; ``cu_seqlens (N + 1,)`` here. Raises ValueError for a negative step.
    """
    layout = Layout.of(u, A, B, cu_seqlens)
    y = uninitialised(layout.batch, layout.time, layout.channels)
    state = uninitialised(layout.sequences, layout.channels, layout.states)
    shape = saved_shape(layout.batch, layout.time, layout.channels, layout.states, layout.sequences)
    saved = uninitialised(*shape) if save else uninitialised(0, 0, 0)
    if save:
        saved[layout.kept_starts[-1] :].zero_()
    blocks = layout.blocks(FORWARD_BLOCK)
    items = layout.sequences * layout.groups * blocks
    negative = np.zeros(items, np.bool_)
    arguments = (
        *(rows(u), rows(delta), dense(A, 2), rows(B), rows(C), dense(D, 1), dense(delta_bias, 1), absent_rows(gate)),
        *(dense(initial_state, 3), layout.starts, layout.kept_starts, layout.groups, blocks),
        *(y.numpy().reshape(layout.tokens, layout.channels), state.numpy(), saved.numpy(), negative),
    )
    pool.run_over_items(lambda first, last: _forward_items(first, last, *arguments), items)
    if negative.any():
        raise ValueError(NEGATIVE_STEP)
    return y if y.dtype == u.dtype else y.to(u.dtype), state, saved


NEGATIVE_STEP = "delta must not be negative: it is a step in time; make it positive first, as with softplus"


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(
    first_item,
    last_item,
    u,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    gate,
    initial_state,
    starts,
    kept_starts,
    groups,
    blocks,
    y,
    last_state,
    saved,
    negative,
):
    channels, states = A.shape
    group_channels = channels // groups
    width = padded_channels((group_channels + blocks - 1) // blocks)
    rate = np.zeros((states, width), np.float32)
    state = np.zeros((states, width), np.float32)
    steps = np.zeros(width, np.float32)
    write = np.zeros(width, np.float32)
    out = np.zeros(width, np.float32)
    for item in range(first_item, last_item):
        group, sequence = item // blocks % groups, item // (blocks * groups)
        left = group * group_channels + group_channels * (item % blocks) // blocks
        count = group * group_channels + group_channels * (item % blocks + 1) // blocks - left
        load_rates(A, left, count, rate)
        load_state(initial_state, sequence, left, count, state)
        steps[:], write[:] = 0, 0
        begin = starts[sequence]
        for t in range(begin, starts[sequence + 1]):
            if saved.shape[0] > 0 and t > begin and (t - begin) % CHUNK == 0:
                place = kept_starts[sequence] + (t - begin) // CHUNK - 1
                for n in range(states):
                    saved[place, n, left : left + count] = state[n, :count]
            load_steps(delta, delta_bias, t, left, count, steps)
            inputs = u[t, left : left + count]
            below = 0
            for c in range(count):
                below += steps[c] < 0
            negative[item] |= below > 0
            for c in range(count):
                write[c] = steps[c] * inputs[c]
            if D.shape[0] > 0:
                for c in range(count):
                    out[c] = D[left + c] * inputs[c]
            else:
                out[:] = 0
            advance(states, width, rate, state, B, t * B.shape[1] + group * states, C, t * C.shape[1] + group * states,
                    steps, write, out)  # fmt: skip
            outputs = y[t, left : left + count]
            if gate.shape[0] > 0:
                gates = gate[t, left : left + count]
                for c in range(count):
                    outputs[c] = out[c] * (gates[c] * sigmoid32(gates[c]))
            else:
                outputs[:] = out[:count]
        store_state(state, last_state, sequence, left, count)


def step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: ``y (B, 1, D)`` in u's dtype and the state after it, a fresh tensor; arguments as of ``forward``."""
    y = uninitialised(*u.shape)
    after = uninitialised(*state.shape)
    negative = step_rows(
        *(rows(u), rows(delta), dense(A, 2), rows(B), rows(C), dense(D, 1), dense(delta_bias, 1), absent_rows(gate)),
        *(dense(state, 3), y.numpy()[:, 0], after.numpy(), B.shape[2]),
    )
    if negative:
        raise ValueError(NEGATIVE_STEP)
    return y if y.dtype == u.dtype else y.to(u.dtype), after


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def step_rows(u, delta, A, B, C, D, delta_bias, gate, state, y, after, groups):
    """One token of every row ``b``: fills ``y (rows, channels)`` and ``after``; returns whether a step is negative."""
    channels, states = A.shape
    steps = np.empty(channels, np.float32)
    per_group, negative = channels // groups, False
    for b in range(state.shape[0]):
        load_steps(delta, delta_bias, b, 0, channels, steps)
        for d in range(channels):
            step, at = steps[d], d // per_group * states
            write, total = step * u[b, d], np.float32(0)
            negative |= step < 0
            for n in range(states):
                new = exp32(step * A[d, n]) * state[b, d, n] + write * B[b, at + n]
                after[b, d, n] = new
                total += new * C[b, at + n]
            if D.shape[0] > 0:
                total += D[d] * u[b, d]
            y[b, d] = total
        if gate.shape[0] > 0:
            for d in range(channels):
                y[b, d] *= gate[b, d] * sigmoid32(gate[b, d])
    return negative
