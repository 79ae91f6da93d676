"""The shared recurrence on a CPU, chunk by chunk in numba: forward pass, and the door to backward and step.

With S (K, V) per head, d_t = v_t (no erase) or v_t - (diag(e^g) S)^T k_t (delta rule) and w_t = k_t or beta_t k_t::

    S_t = diag(e^{g_t}) S_{t-1} + w_t d_t^T        o_t = scale S_t^T q_t

Chunk form of Yang et al. 2024 (gated linear attention; delta rule over sequence length); ``cpu_chunks`` tells how it is
cut and scaled. One work item is one head of one sequence, or a slice of its value columns, which are independent.
"""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, multiply, padded, solve_unit_lower, transpose, whole
from subquad.kernels.recurrence.checks import check_gates
from subquad.kernels.recurrence.cpu_backward import backward
from subquad.kernels.recurrence.cpu_chunks import (
    NO_DECAY,
    apply_lower,
    begin_chunk,
    describe,
    load_read_rows,
    load_rows,
    load_state,
    load_write_rows,
    lower_product,
    mask_scores,
    prepare,
    saved_states,
    scale_state,
    store_rows,
    store_state,
    uninitialised,
    value_slices,
)
from subquad.kernels.recurrence.cpu_step import step

__all__ = ["backward", "forward", "saved_shapes", "step"]


def saved_shapes(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_width: int,
    log_decay_ndim: int,
    has_beta: bool,
    sequences: int,
    chunk_size: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``saved`` (states between groups of chunks) and ``saved_updates`` (d of the delta rule) of ``forward``.

    They follow from shapes alone: for packed sequences (``q_shape[0] == 1``) the number of states is an upper bound,
    whatever ``sequences``, the kind of decay and ``chunk_size``.
    """
    batch, time, heads, width = q_shape
    states = saved_states(batch, time, k_shape[1] // time)
    updates = (batch, k_shape[1], heads, v_width) if has_beta else (0,)
    return ((states, heads, width, v_width) if states else (0,)), updates


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, final state, and what ``backward`` wants (empty unless ``save``).

    Args:
        q: ``(B, T, H, K)``; float32, bfloat16 or float16, computed in float32.
        k, v: ``(B, T n, H, K)`` and ``(B, T n, H, V)``: n updates per token, of which the read sees all.
        log_decay: None, ``(H,)``, ``(B, T, H)`` or ``(B, T, H, K)`` float32, at most 0; applied before a token's first
            update; clamped at -100.
        beta: ``(B, T n, H)`` float32 in [0, 2] for the delta rule; None writes without erasing.
        initial_state: ``(N, H, K, V)`` float32 or None for zeros; N = B or the number of packed sequences.
        cu_seqlens: ``(N + 1,)`` first token of each packed sequence and the end of the last, with B = 1; or None.
        chunk_size: chunks are at most this long; it never changes the result beyond rounding.

    Returns:
        ``o (B, T, H, V)`` in v's dtype, the final state ``(N, H, K, V)`` float32, ``saved`` and ``saved_updates``.

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T, log_decay above 0, beta
            outside [0, 2]. NaN is not refused: it stays in its head of its sequence.
    """
    form = describe(q, k, v, cu_seqlens, chunk_size)
    arrays = prepare(q, k, v, log_decay, beta, initial_state, form)
    check_gates(log_decay, beta)
    batch, time, heads, width = q.shape
    out = uninitialised(batch, time, heads, form.value_width)
    final_state = uninitialised(form.sequences, heads, width, form.value_width)
    saved, saved_updates = uninitialised(0), uninitialised(0)
    if save:
        shapes = saved_shapes(
            tuple(q.shape), tuple(k.shape), form.value_width, 0, beta is not None, form.sequences, chunk_size
        )
        saved, saved_updates = (uninitialised(*shape) for shape in shapes)
        saved[form.group_starts[-1] :].zero_()
    slices = value_slices(form)

    def work(first: int, last: int) -> None:
        _forward_items(
            first,
            last,
            *arrays,
            form.starts,
            form.group_starts,
            out.numpy().reshape(form.tokens, heads, form.value_width),
            final_state.numpy(),
            saved.numpy().reshape(-1, heads, width, form.value_width),
            saved_updates.numpy().reshape(-1, heads, form.value_width),
            form.updates,
            form.chunk_tokens,
            form.group_tokens,
            slices,
            float(scale),
        )

    pool.run_over_items(work, form.sequences * heads * slices)
    return out.to(v.dtype), final_state, saved, saved_updates


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(
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
    out,
    final_state,
    saved,
    saved_updates,
    per_token,
    chunk_tokens,
    group_tokens,
    slices,
    scale,
):
    heads, width, all_columns = q.shape[1], q.shape[2], v.shape[2]
    erase, one = beta.shape[0] > 0, np.float32(1)
    most_rows = chunk_tokens * per_token
    most_reads = chunk_tokens + (most_rows if erase else 0)
    most_columns = (all_columns + slices - 1) // slices
    state = np.zeros((padded(width), padded(most_columns)), np.float32)
    reads = np.zeros((padded(most_reads), padded(width)), np.float32)
    writes = np.zeros((padded(most_rows), padded(width)), np.float32)
    writes_transposed = np.zeros((padded(width), padded(most_rows)), np.float32)
    scores = np.zeros((padded(most_reads), padded(most_rows)), np.float32)
    products = np.zeros((padded(most_reads), padded(most_columns)), np.float32)
    values = np.zeros((padded(most_rows), padded(most_columns)), np.float32)
    sums = np.empty((chunk_tokens, width), np.float32)
    scales = np.empty((chunk_tokens, width), np.float32)
    incoming = np.empty(width, np.float32)
    outgoing = np.empty(width, np.float32)

    for item in range(first_item, last_item):
        head, sequence = item // slices % heads, item // (slices * heads)
        left = all_columns * (item % slices) // slices
        columns = all_columns * (item % slices + 1) // slices - left
        if initial_state.shape[0] > 0:
            load_state(initial_state, sequence, head, left, width, columns, state)
        else:
            state[:] = 0
        begin, end = starts[sequence], starts[sequence + 1]
        token = begin
        while token < end:
            group = (token - begin) // group_tokens
            group_end = min(begin + (group + 1) * group_tokens, end)
            if group > 0 and token == begin + group * group_tokens and saved.shape[0] > 0:
                place = group_starts[sequence] + group - 1
                store_state(state, width, columns, saved, place, head, left)
            length = begin_chunk(
                log_decay,
                kind,
                head,
                token,
                min(chunk_tokens, group_end - token),
                width,
                sums,
                scales,
                incoming,
                outgoing,
            )
            rows, row = length * per_token, token * per_token
            erased = rows if erase else 0
            if erase:
                load_read_rows(k, row, rows, head, width, one, kind, scales, per_token, reads)
            load_read_rows(q, token, length, head, width, np.float32(scale), kind, scales, 1, reads[erased:])
            load_write_rows(k, beta, erase, row, rows, head, width, kind, scales, per_token, writes)
            load_rows(v, row, rows, head, left, columns, values)
            if kind != NO_DECAY:
                scale_state(state, incoming, width, columns)
            transpose(writes, whole(rows), whole(width), writes_transposed)
            if erase:
                lower_product(0, rows, 1, rows, width, reads, writes_transposed, scores)
            lower_product(erased, length, per_token, rows, width, reads, writes_transposed, scores)
            mask_scores(scores, erased, length, rows, per_token)
            multiply(False, erased + length, whole(columns), width, one, reads, state, False, products)
            if erase:
                for i in range(rows):
                    for c in range(columns):
                        values[i, c] -= products[i, c]
                solve_unit_lower(scores, values, rows, whole(columns))
                if saved_updates.shape[0] > 0:
                    store_rows(values, rows, columns, saved_updates, row, head, left)
            apply_lower(erased, length, per_token, rows, whole(columns), scores, values, products)
            store_rows(products[erased:], length, columns, out, token, head, left)
            multiply(True, width, whole(columns), rows, one, writes, values, True, state)
            if kind != NO_DECAY:
                scale_state(state, outgoing, width, columns)
            token += length
        store_state(state, width, columns, final_state, sequence, head, left)
