"""The selective scan backwards on a CPU, in numba: chunk by chunk from the end, states recomputed inside a chunk.

With g_t the gradient of h_t, a_t = e^{delta_t A}, and everything per channel d and state n::

    g_t = C_t dy_t + a_{t+1} g_{t+1}     dC_t[n] = sum_d dy h_t     dB_t[n] = sum_d g delta u
    du = delta sum_n g B + D dy          d delta = sum_n g (A a_t h_{t-1} + B u)
    dA = sum_t g delta a_t h_{t-1}       dh_0 = a_1 g_1     dD = sum_t dy u

Sums over channels (dB, dC) are taken per block and added up after; so are those over sequences (dA, dD, the bias).
"""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, LANES
from subquad.kernels.scan.cpu_layout import BACKWARD_BLOCK, CHUNK, Layout, absent_rows, dense, rows, uninitialised
from subquad.kernels.scan.cpu_pieces import load_rates, load_state, load_steps, padded_channels, store_state
from subquad.kernels.scan.cpu_vectors import LN_2, replay, retreat
from subquad.kernels.steps.pieces import sigmoid32


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
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
    saved: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias, gate and the initial state; empty for what is absent.

    ``grad_y (B, T, D)`` and ``grad_state (N, D, states)``, the last state's; the rest as given to ``forward``.
    """
    layout = Layout.of(u, A, B, cu_seqlens)
    channels, states, groups = layout.channels, layout.states, layout.groups
    blocks = layout.blocks(BACKWARD_BLOCK)
    grad_u = uninitialised(layout.tokens, channels)
    grad_delta = uninitialised(layout.tokens, channels)
    grad_gate = uninitialised(layout.tokens if gate is not None else 0, channels)
    grad_a = uninitialised(layout.sequences, channels, states)
    grad_channels = uninitialised(layout.sequences, 2, channels)  # of D and of the bias
    grad_shared = uninitialised(2, blocks, layout.tokens, groups, states)  # of B and of C
    grad_initial = uninitialised(layout.sequences, channels, states)
    arguments = (
        *(rows(grad_y), dense(grad_state, 3), rows(u), rows(delta), dense(A, 2), rows(B), rows(C), dense(D, 1)),
        *(dense(delta_bias, 1), absent_rows(gate), dense(initial_state, 3), layout.starts, layout.kept_starts),
        *(saved.numpy(), groups, blocks, grad_u.numpy(), grad_delta.numpy(), grad_gate.numpy(), grad_a.numpy()),
        *(grad_channels.numpy(), grad_shared.numpy(), grad_initial.numpy()),
    )
    pool.run_over_items(
        lambda first, last: _backward_items(first, last, *arguments), layout.sequences * groups * blocks
    )
    by_channel = grad_channels.sum(0)
    shared = grad_shared.sum(1) if blocks > 1 else grad_shared[:, 0]
    return (
        grad_u.view(u.shape).to(u.dtype),
        grad_delta.view(u.shape).to(delta.dtype),
        grad_a.sum(0).to(A.dtype),
        shared[0].view(B.shape).to(B.dtype, copy=True),
        shared[1].view(C.shape).to(C.dtype, copy=True),
        u.new_empty(0) if D is None else by_channel[0].to(D.dtype, copy=True),
        u.new_empty(0) if delta_bias is None else by_channel[1].to(delta_bias.dtype, copy=True),
        u.new_empty(0) if gate is None else grad_gate.view(u.shape).to(gate.dtype),
        u.new_empty(0) if initial_state is None else grad_initial.to(initial_state.dtype),
    )


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item,
    last_item,
    grad_y,
    grad_state,
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
    saved,
    groups,
    blocks,
    grad_u,
    grad_delta,
    grad_gate,
    grad_a,
    grad_channels,
    grad_shared,
    grad_initial,
):
    channels, states = A.shape
    group_channels = channels // groups
    width = padded_channels((group_channels + blocks - 1) // blocks)
    rate = np.zeros((states, width), np.float32)
    state = np.zeros((states, width), np.float32)
    carried = np.empty((CHUNK, states, width), np.float32)
    decays = np.empty((CHUNK, states, width), np.float32)
    steps = np.zeros((CHUNK, width), np.float32)
    write = np.zeros((CHUNK, width), np.float32)
    dy = np.zeros((CHUNK, width), np.float32)
    out = np.zeros(width, np.float32)
    skip = np.zeros(width, np.float32)
    grad = np.zeros((states, width), np.float32)
    grad_rate = np.zeros((states, width), np.float32)
    grad_skip = np.zeros(width, np.float32)
    grad_bias = np.zeros(width, np.float32)
    through_b = np.zeros(width, np.float32)
    through_decay = np.zeros(width, np.float32)
    grad_b = np.zeros((states, LANES), np.float32)
    grad_c = np.zeros((states, LANES), np.float32)
    for item in range(first_item, last_item):
        block, group, sequence = item % blocks, item // blocks % groups, item // (blocks * groups)
        left = group * group_channels + group_channels * block // blocks
        count = group * group_channels + group_channels * (block + 1) // blocks - left
        right, b_at = left + count, group * states
        load_rates(A, left, count, rate)
        load_state(grad_state, sequence, left, count, grad)
        grad_rate[:], grad_skip[:], grad_bias[:] = 0, 0, 0
        steps[:], write[:], dy[:] = 0, 0, 0
        if D.shape[0] > 0:
            skip[:count] = D[left:right]
        begin, end = starts[sequence], starts[sequence + 1]
        for chunk in range((end - begin + CHUNK - 1) // CHUNK - 1, -1, -1):
            first = begin + chunk * CHUNK
            length = min(CHUNK, end - first)
            if chunk == 0:
                load_state(initial_state, sequence, left, count, state)
            else:
                for n in range(states):
                    state[n, :count] = saved[kept_starts[sequence] + chunk - 1, n, left:right]
            for i in range(length):
                t = first + i
                load_steps(delta, delta_bias, t, left, count, steps[i])
                inputs, gradients, step, written, read = (
                    u[t, left:right],
                    grad_y[t, left:right],
                    steps[i],
                    write[i],
                    dy[i],
                )
                for c in range(count):
                    written[c] = step[c] * inputs[c]
                for c in range(count):
                    out[c] = skip[c] * inputs[c]
                replay(states, width, rate, state, B, t * B.shape[1] + b_at, C, t * C.shape[1] + b_at, step, written,
                       out, carried, decays, i * states * width)  # fmt: skip
                if gate.shape[0] > 0:
                    gates, results = gate[t, left:right], grad_gate[t, left:right]
                    for c in range(count):
                        s = sigmoid32(gates[c])
                        results[c] = gradients[c] * out[c] * s * (np.float32(1) + gates[c] * (np.float32(1) - s))
                    for c in range(count):
                        read[c] = gradients[c] * gates[c] * sigmoid32(gates[c])
                else:
                    read[:count] = gradients
            for i in range(length - 1, -1, -1):
                t = first + i
                step, read = steps[i], dy[i]
                grad_b[:], grad_c[:] = 0, 0
                retreat(states, width, rate, carried, decays, i * states * width, grad, grad_rate,
                        B, t * B.shape[1] + b_at, C, t * C.shape[1] + b_at, step, write[i], read,
                        through_b, through_decay, grad_b, grad_c)  # fmt: skip
                for n in range(states):
                    b_total, c_total = np.float32(0), np.float32(0)
                    for lane in range(LANES):
                        b_total += grad_b[n, lane]
                        c_total += grad_c[n, lane]
                    grad_shared[0, block, t, group, n], grad_shared[1, block, t, group, n] = b_total, c_total
                inputs, of_u, of_delta = u[t, left:right], grad_u[t, left:right], grad_delta[t, left:right]
                for c in range(count):
                    of_u[c] = skip[c] * read[c] + step[c] * through_b[c]
                for c in range(count):
                    through_decay[c] = inputs[c] * through_b[c] + LN_2 * through_decay[c]
                if delta_bias.shape[0] > 0:
                    logits = delta[t, left:right]
                    for c in range(count):
                        through_decay[c] *= sigmoid32(logits[c] + delta_bias[left + c])
                    for c in range(count):
                        grad_bias[c] += through_decay[c]
                of_delta[:] = through_decay[:count]
                for c in range(count):
                    grad_skip[c] += read[c] * inputs[c]
        store_state(grad, grad_initial, sequence, left, count)
        store_state(grad_rate, grad_a, sequence, left, count)
        grad_channels[sequence, 0, left:right] = grad_skip[:count]
        grad_channels[sequence, 1, left:right] = grad_bias[:count]
