"""Backward pass of the shared recurrence on a CPU: groups of chunks in reverse, states inside a group recomputed.

R is the gradient of the state after a chunk, G that of the outputs, S the incoming state; else as in ``cpu_chunks``::

    Y = (I + L)^-T (A^T G + write R)       dv = Y         d scores = [-Y; G] D^T, masked
    d read = [-Y; G] S^T + d scores write  d write = D R^T + d scores^T read      R <- R + read^T [-Y; G]

The gradient of log decay t in a channel is the inner product over V of the state before the chunk with its gradient,
less the sum of read d read - write d write over the chunk's tokens before t. Pairs of rows of the same token cancel in
that sum; they are left out of it, so that a strong decay's tiny gradient is not lost in the rounding of its own token.
"""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, multiply, padded, solve_unit_lower_transposed, transpose, whole
from subquad.kernels.recurrence.cpu_chunks import (
    CONSTANT,
    MIN_LOG_DECAY,
    NO_DECAY,
    VECTOR,
    apply_lower,
    apply_lower_transposed,
    begin_chunk,
    describe,
    float32_array,
    load_read_rows,
    load_rows,
    load_state,
    load_write_rows,
    lower_product,
    mask_scores,
    prepare,
    scale_state,
    store_rows,
    store_state,
    uninitialised,
    value_slices,
)


def backward(
    grad_o: Tensor,
    grad_final_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    saved_updates: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of q, k, v (in their dtypes), log_decay and beta (None where absent) and the initial state.

    ``saved`` and ``saved_updates`` come from ``forward(..., save=True)`` of the same arguments, with the same
    ``chunk_size``; shapes as there.
    """
    form = describe(q, k, v, cu_seqlens, chunk_size)
    arrays = prepare(q, k, v, log_decay, beta, initial_state, form)
    tokens, heads, width, columns = form.tokens, form.heads, form.key_width, form.value_width
    rows, slices = tokens * form.updates, value_slices(form)
    grad_out = float32_array(grad_o).reshape(tokens, heads, columns)
    grad_final = float32_array(grad_final_state).reshape(form.sequences, heads, width, columns)
    states = float32_array(saved).reshape(-1, heads, width, columns)
    updates = float32_array(saved_updates).reshape(-1, heads, columns)
    if len(states) < form.group_starts[-1] or (beta is not None and len(updates) != rows):
        raise ValueError(
            f"saved has {len(states)} states and {len(updates)} updates, but these inputs need {form.group_starts[-1]} "
            f"and {0 if beta is None else rows}: pass what forward(..., save=True) returned for them"
        )
    gates = arrays.log_decay.shape if arrays.decay_kind != CONSTANT else (form.sequences, heads, 1)
    grad_q = uninitialised(slices, tokens, heads, width)
    grad_k = uninitialised(slices, rows, heads, width)
    grad_v = uninitialised(rows, heads, columns)
    grad_decay = uninitialised(slices, *gates)
    grad_beta = uninitialised(slices, *arrays.beta.shape)
    grad_initial = uninitialised(form.sequences, heads, width, columns)

    def work(first: int, last: int) -> None:
        _backward_items(
            first,
            last,
            *arrays,
            form.starts,
            form.group_starts,
            states,
            updates,
            grad_out,
            grad_final,
            grad_q.numpy(),
            grad_k.numpy(),
            grad_v.numpy(),
            grad_decay.numpy(),
            grad_beta.numpy(),
            grad_initial.numpy(),
            form.updates,
            form.chunk_tokens,
            form.group_tokens,
            slices,
            float(scale),
        )

    pool.run_over_items(work, form.sequences * heads * slices)

    def whole(grad: Tensor, like: Tensor) -> Tensor:
        return (grad[0] if slices == 1 else grad.sum(0)).reshape(like.shape).to(like.dtype)

    grad_log_decay = None
    if log_decay is not None:
        if arrays.decay_kind == CONSTANT:
            grad_decay = grad_decay.sum(1)
        grad_log_decay = whole(grad_decay, log_decay)
    return (
        whole(grad_q, q),
        whole(grad_k, k),
        grad_v.reshape(v.shape).to(v.dtype),
        grad_log_decay,
        None if beta is None else whole(grad_beta, beta),
        grad_initial,
    )


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item,
    last_item,
    q,
    k,
    v,
    log_decay,
    beta,
    initial_state,
    kind,
    starts,
    group_starts,
    saved,
    saved_updates,
    grad_out,
    grad_final,
    grad_q,
    grad_k,
    grad_v,
    grad_decay,
    grad_beta,
    grad_initial,
    per_token,
    chunk_tokens,
    group_tokens,
    slices,
    scale,
):
    heads, width, all_columns = q.shape[1], q.shape[2], v.shape[2]
    erase, one = beta.shape[0] > 0, np.float32(1)
    factor = np.float32(scale)
    most_rows = chunk_tokens * per_token
    most_reads = chunk_tokens + (most_rows if erase else 0)
    most_columns = (all_columns + slices - 1) // slices
    # One group: where its chunks begin, their scales, write rows and incoming states.
    chunk_starts = np.empty(group_tokens + 1, np.int64)
    group_scales = np.empty((group_tokens, width), np.float32)
    group_writes = np.zeros((group_tokens * per_token + 16, padded(width)), np.float32)
    incoming = np.empty((group_tokens, width), np.float32)
    outgoing = np.empty((group_tokens, width), np.float32)
    states = np.zeros((group_tokens // chunk_tokens, padded(width), padded(most_columns)), np.float32)
    # One chunk.
    sums = np.empty((chunk_tokens, width), np.float32)
    reads = np.zeros((padded(most_reads), padded(width)), np.float32)
    values = np.zeros((padded(most_rows), padded(most_columns)), np.float32)
    scores = np.zeros((padded(most_reads), padded(most_rows)), np.float32)
    grad_scores = np.zeros((padded(most_reads), padded(most_rows)), np.float32)
    grad_products = np.zeros((padded(most_reads), padded(most_columns)), np.float32)
    grad_values = np.zeros((padded(most_rows), padded(most_columns)), np.float32)
    grad_reads = np.zeros((padded(most_reads), padded(width)), np.float32)
    grad_writes = np.zeros((padded(most_rows), padded(width)), np.float32)
    writes_transposed = np.zeros((padded(width), padded(most_rows)), np.float32)
    values_transposed = np.zeros((padded(most_columns), padded(most_rows)), np.float32)
    state_transposed = np.zeros((padded(most_columns), padded(width)), np.float32)
    own_scores = np.empty((most_reads, per_token), np.float32)
    decay_sums = np.empty(width, np.float32)
    state = np.zeros((padded(width), padded(most_columns)), np.float32)
    grad_state = np.zeros((padded(width), padded(most_columns)), np.float32)

    for item in range(first_item, last_item):
        piece, head, sequence = item % slices, item // slices % heads, item // (slices * heads)
        left = all_columns * piece // slices
        columns = all_columns * (piece + 1) // slices - left
        begin, end = starts[sequence], starts[sequence + 1]
        load_state(grad_final, sequence, head, left, width, columns, grad_state)
        constant_total = 0.0

        for group in range((end - begin + group_tokens - 1) // group_tokens - 1, -1, -1):
            group_begin = begin + group * group_tokens
            group_end = min(group_begin + group_tokens, end)
            if group > 0:
                load_state(saved, group_starts[sequence] + group - 1, head, left, width, columns, state)
            elif initial_state.shape[0] > 0:
                load_state(initial_state, sequence, head, left, width, columns, state)
            else:
                state[:] = 0
            chunks, token = 0, group_begin
            while token < group_end:
                if chunks == states.shape[0]:
                    larger = np.zeros((2 * chunks, *states.shape[1:]), np.float32)
                    larger[:chunks] = states
                    states = larger
                offset = token - group_begin
                length = begin_chunk(
                    log_decay, kind, head, token, min(chunk_tokens, group_end - token), width, sums,
                    group_scales[offset:], incoming[chunks], outgoing[chunks],
                )  # fmt: skip
                rows, row = length * per_token, token * per_token
                writes = group_writes[offset * per_token :]
                load_write_rows(k, beta, erase, row, rows, head, width, kind, group_scales[offset:], per_token, writes)
                if kind != NO_DECAY:
                    scale_state(state, incoming[chunks], width, columns)
                states[chunks] = state
                if token + length < group_end:
                    if erase:
                        load_rows(saved_updates, row, rows, head, left, columns, values)
                    else:
                        load_rows(v, row, rows, head, left, columns, values)
                    multiply(True, width, whole(columns), rows, one, writes, values, True, state)
                    if kind != NO_DECAY:
                        scale_state(state, outgoing[chunks], width, columns)
                chunk_starts[chunks] = token
                chunks += 1
                token += length
            chunk_starts[chunks] = group_end

            for chunk in range(chunks - 1, -1, -1):
                token = chunk_starts[chunk]
                length, offset = chunk_starts[chunk + 1] - token, token - group_begin
                rows, row = length * per_token, token * per_token
                erased = rows if erase else 0
                scales, writes, before = group_scales[offset:], group_writes[offset * per_token :], states[chunk]
                if erase:
                    load_read_rows(k, row, rows, head, width, one, kind, scales, per_token, reads)
                    load_rows(saved_updates, row, rows, head, left, columns, values)
                else:
                    load_rows(v, row, rows, head, left, columns, values)
                load_read_rows(q, token, length, head, width, factor, kind, scales, 1, reads[erased:])
                load_rows(grad_out, token, length, head, left, columns, grad_products[erased:])
                if kind != NO_DECAY:
                    scale_state(grad_state, outgoing[chunk], width, columns)

                transpose(writes, whole(rows), whole(width), writes_transposed)
                if erase:
                    lower_product(0, rows, 1, rows, width, reads, writes_transposed, scores)
                lower_product(erased, length, per_token, rows, width, reads, writes_transposed, scores)
                mask_scores(scores, erased, length, rows, per_token)
                multiply(False, rows, whole(columns), width, one, writes, grad_state, False, grad_values)
                apply_lower_transposed(
                    erased, length, per_token, rows, whole(columns), scores, grad_products, grad_values
                )
                if erase:
                    solve_unit_lower_transposed(scores, grad_values, rows, whole(columns))
                    for i in range(rows):
                        for c in range(columns):
                            grad_products[i, c] = -grad_values[i, c]
                store_rows(grad_values, rows, columns, grad_v, row, head, left)

                transpose(values, whole(rows), whole(columns), values_transposed)
                if erase:
                    lower_product(0, rows, 1, rows, columns, grad_products, values_transposed, grad_scores)
                lower_product(erased, length, per_token, rows, columns, grad_products, values_transposed, grad_scores)
                mask_scores(grad_scores, erased, length, rows, per_token)
                if kind != NO_DECAY:
                    _take_own_scores(grad_scores, erased, length, per_token, own_scores)
                transpose(before, whole(width), whole(columns), state_transposed)
                multiply(
                    False,
                    erased + length,
                    whole(width),
                    columns,
                    one,
                    grad_products,
                    state_transposed,
                    False,
                    grad_reads,
                )
                if erase:
                    apply_lower(0, rows, 1, rows, whole(width), grad_scores, writes, grad_reads)
                apply_lower(erased, length, per_token, rows, whole(width), grad_scores, writes, grad_reads)
                transpose(grad_state, whole(width), whole(columns), state_transposed)
                multiply(False, rows, whole(width), columns, one, values, state_transposed, False, grad_writes)
                if erase:
                    apply_lower_transposed(0, rows, 1, rows, whole(width), grad_scores, reads, grad_writes)
                apply_lower_transposed(erased, length, per_token, rows, whole(width), grad_scores, reads, grad_writes)
                multiply(True, width, whole(columns), erased + length, one, reads, grad_products, True, grad_state)

                if kind != NO_DECAY:
                    for a in range(width):
                        total = np.float32(0)
                        for c in range(columns):
                            total += before[a, c] * grad_state[a, c]
                        decay_sums[a] = total
                    constant_total += _store_grad_decay(
                        kind, log_decay, token, length, head, width, per_token, erased, decay_sums, reads, grad_reads,
                        writes, grad_writes, grad_decay[piece],
                    )  # fmt: skip
                    _add_own_scores(
                        own_scores, erased, length, per_token, width, reads, writes, grad_reads, grad_writes
                    )
                    scale_state(grad_state, incoming[chunk], width, columns)
                _store_rows(grad_reads[erased:], length, width, factor, kind, scales, token, head, grad_q[piece])
                _store_grad_k(
                    k, beta, erase, grad_reads, grad_writes, rows, width, kind, scales, per_token, row, head,
                    grad_k[piece], grad_beta[piece],
                )  # fmt: skip

        if kind == CONSTANT:
            grad_decay[piece, sequence, head, 0] = constant_total
        store_state(grad_state, width, columns, grad_initial, sequence, head, left)


@njit(fastmath=FASTMATH)
def _take_own_scores(grad_scores, erased, length, per_token, own):
    """Move the entries between rows of the same token out of ``grad_scores``."""
    for i in range(erased + length):
        token = i // per_token if i < erased else i - erased
        for j in range(per_token):
            own[i, j] = grad_scores[i, token * per_token + j]
            grad_scores[i, token * per_token + j] = np.float32(0)


@njit(fastmath=FASTMATH)
def _add_own_scores(own, erased, length, per_token, width, reads, writes, grad_reads, grad_writes):
    """Add what the entries moved out by ``_take_own_scores`` contribute to the rows' gradients."""
    for i in range(erased + length):
        token = i // per_token if i < erased else i - erased
        seen = i % per_token if i < erased else per_token
        for j in range(seen):
            row, weight = token * per_token + j, own[i, j]
            for d in range(width):
                grad_reads[i, d] += weight * writes[row, d]
            for d in range(width):
                grad_writes[row, d] += weight * reads[i, d]


@njit(fastmath=FASTMATH)
def _store_grad_decay(
    kind,
    log_decay,
    token,
    length,
    head,
    width,
    per_token,
    erased,
    sums,
    reads,
    grad_reads,
    writes,
    grad_writes,
    grad_decay,
):
    """Write the log decays' gradients of a chunk; for a constant decay return their sum instead.

    ``sums (K,)`` comes in as that of the chunk's first token and is reduced token by token.
    """
    constant_total = np.float32(0)
    for i in range(length):
        if kind == VECTOR:
            for d in range(width):
                grad_decay[token + i, head, d] = (
                    np.float32(0) if log_decay[token + i, head, d] < MIN_LOG_DECAY else sums[d]
                )
        else:
            total = np.float32(0)
            for d in range(width):
                total += sums[d]
            if log_decay[0 if kind == CONSTANT else token + i, head, 0] < MIN_LOG_DECAY:
                total = np.float32(0)
            if kind == CONSTANT:
                constant_total += total
            else:
                grad_decay[token + i, head, 0] = total
        for d in range(width):
            sums[d] -= reads[erased + i, d] * grad_reads[erased + i, d]
        for j in range(i * per_token, (i + 1) * per_token):
            if erased > 0:
                for d in range(width):
                    sums[d] -= reads[j, d] * grad_reads[j, d]
            for d in range(width):
                sums[d] += writes[j, d] * grad_writes[j, d]
    return constant_total


@njit(fastmath=FASTMATH)
def _store_rows(source, count, width, factor, kind, scales, first, head, target):
    for i in range(count):
        if kind == VECTOR:
            for d in range(width):
                target[first + i, head, d] = source[i, d] * factor * scales[i, d]
        else:
            weight = factor if kind == NO_DECAY else factor * scales[i, 0]
            for d in range(width):
                target[first + i, head, d] = source[i, d] * weight


@njit(fastmath=FASTMATH)
def _store_grad_k(
    k, beta, erase, grad_reads, grad_writes, rows, width, kind, scales, per_token, first, head, grad_k, grad_beta
):
    """``dk = E d read + beta d write / E`` and ``dbeta = d write . k / E``; overwrites ``grad_writes``."""
    for i in range(rows):
        token = i // per_token
        if kind == VECTOR:
            for d in range(width):
                grad_writes[i, d] /= scales[token, d]
        elif kind != NO_DECAY:
            weight = np.float32(1) / scales[token, 0]
            for d in range(width):
                grad_writes[i, d] *= weight
        if not erase:
            for d in range(width):
                grad_k[first + i, head, d] = grad_writes[i, d]
            continue
        total = np.float32(0)
        for d in range(width):
            total += grad_writes[i, d] * k[first + i, head, d]
        grad_beta[first + i, head] = total
        weight = beta[first + i, head]
        if kind == VECTOR:
            for d in range(width):
                grad_k[first + i, head, d] = weight * grad_writes[i, d] + grad_reads[i, d] * scales[token, d]
        else:
            read_weight = np.float32(1) if kind == NO_DECAY else scales[token, 0]
            for d in range(width):
                grad_k[first + i, head, d] = weight * grad_writes[i, d] + grad_reads[i, d] * read_weight
