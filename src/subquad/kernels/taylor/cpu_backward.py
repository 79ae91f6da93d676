"""Backward pass of the Taylor kernel: one run over the chunks in order for q, one in reverse for k, v and the state.

G is the gradient of the outputs, R that of the state after a chunk, D that of the chunk's scores; else as in ``cpu``::

    D = tril(G V^T) (1 + s)                  R <- R + Phi_q^T G
    dq = D K + (d phi / d q) (G S^T)         dk = D^T Q + (d phi / d k) (V R^T)        dv = P^T G + Phi_k R

The first run rebuilds S as it goes, so that nothing is kept from the forward pass.
"""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, multiply, padded, transpose, whole
from subquad.kernels.recurrence.cpu_chunks import (
    CHUNK_ROWS,
    apply_lower,
    apply_lower_transposed,
    describe,
    empty,
    float32_array,
    load_rows,
    load_state,
    lower_product,
    store_rows,
    store_state,
    uninitialised,
)
from subquad.kernels.taylor.cpu_features import add_feature_gradient, load_features, polynomial_gradient
from subquad.kernels.taylor.features import feature_width


def backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in their dtypes, and of the initial state (empty where there was none)."""
    form = describe(q, k, v, cu_seqlens, CHUNK_ROWS)
    heads, tokens, features = form.heads, form.tokens, feature_width(form.key_width)
    grad_q, grad_k, grad_v = (uninitialised(tokens, heads, x.shape[3]) for x in (q, k, v))
    grad_initial = uninitialised(form.sequences, heads, features, form.value_width)

    def work(first: int, last: int) -> None:
        _backward_items(
            first,
            last,
            float32_array(q).reshape(tokens, heads, -1),
            float32_array(k).reshape(tokens, heads, -1),
            float32_array(v).reshape(tokens, heads, -1),
            empty(4) if initial_state is None else float32_array(initial_state),
            form.starts,
            float32_array(grad_o).reshape(tokens, heads, -1),
            float32_array(grad_state),
            grad_q.numpy(),
            grad_k.numpy(),
            grad_v.numpy(),
            grad_initial.numpy(),
            features,
            np.float32(scale),
        )

    pool.run_over_items(work, form.sequences * heads)
    gradients = (g.reshape(x.shape).to(x.dtype) for g, x in zip((grad_q, grad_k, grad_v), (q, k, v)))
    return (*gradients, grad_initial if initial_state is not None else uninitialised(0))  # type: ignore[return-value]


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item,
    last_item,
    q,
    k,
    v,
    initial_state,
    starts,
    grad_o,
    grad_final,
    grad_q,
    grad_k,
    grad_v,
    grad_initial,
    features,
    scale,
):
    heads, width, columns = q.shape[1], q.shape[2], v.shape[2]
    chunk, one = CHUNK_ROWS, np.float32(1)
    state = np.zeros((padded(features), padded(columns)), np.float32)
    query = np.zeros((padded(chunk), padded(width)), np.float32)
    key = np.zeros((padded(chunk), padded(width)), np.float32)
    values = np.zeros((padded(chunk), padded(columns)), np.float32)
    grads = np.zeros((padded(chunk), padded(columns)), np.float32)
    query_transposed = np.zeros((padded(width), padded(chunk)), np.float32)
    key_transposed = np.zeros((padded(width), padded(chunk)), np.float32)
    values_transposed = np.zeros((padded(columns), padded(chunk)), np.float32)
    grads_transposed = np.zeros((padded(columns), padded(chunk)), np.float32)
    phi = np.zeros((padded(features), padded(chunk)), np.float32)
    grad_phi = np.zeros((padded(features), padded(chunk)), np.float32)
    scores = np.zeros((padded(chunk), padded(chunk)), np.float32)
    grad_scores = np.zeros((padded(chunk), padded(chunk)), np.float32)
    found = np.zeros((padded(chunk), padded(width)), np.float32)
    found_transposed = np.zeros((padded(width), padded(chunk)), np.float32)
    grad_values = np.zeros((padded(chunk), padded(columns)), np.float32)

    for item in range(first_item, last_item):
        head, sequence = item % heads, item // heads
        begin, end = starts[sequence], starts[sequence + 1]
        chunks = (end - begin + chunk - 1) // chunk
        for reverse in range(2):
            if reverse == 1:
                load_state(grad_final, sequence, head, 0, features, columns, state)
            elif initial_state.shape[0] > 0:
                load_state(initial_state, sequence, head, 0, features, columns, state)
            else:
                state[:] = 0
            for n in range(chunks):
                token = begin + (chunks - 1 - n if reverse == 1 else n) * chunk
                rows = min(chunk, end - token)
                load_rows(q, token, rows, head, 0, width, query)
                load_rows(k, token, rows, head, 0, width, key)
                load_rows(v, token, rows, head, 0, columns, values)
                load_rows(grad_o, token, rows, head, 0, columns, grads)
                transpose(query, whole(rows), whole(width), query_transposed)
                transpose(key, whole(rows), whole(width), key_transposed)
                transpose(values, whole(rows), whole(columns), values_transposed)
                lower_product(0, rows, 1, rows, width, query, key_transposed, scores)
                lower_product(0, rows, 1, rows, columns, grads, values_transposed, grad_scores)
                polynomial_gradient(scores, grad_scores, rows, scale)
                load_features(key_transposed, width, whole(rows), scale, phi)
                found[:rows] = 0
                found_transposed[:] = 0
                if reverse == 0:
                    transpose(grads, whole(rows), whole(columns), grads_transposed)
                    apply_lower(0, rows, 1, rows, whole(width), grad_scores, key, found)
                    multiply(False, features, whole(rows), columns, one, state, grads_transposed, False, grad_phi)
                    add_feature_gradient(query_transposed, width, whole(rows), scale, grad_phi, found_transposed)
                    multiply(False, features, whole(columns), rows, one, phi, values, True, state)
                else:
                    apply_lower_transposed(0, rows, 1, rows, whole(width), grad_scores, query, found)
                    multiply(True, rows, whole(columns), features, one, phi, state, False, grad_values)
                    apply_lower_transposed(0, rows, 1, rows, whole(columns), scores, grads, grad_values)
                    store_rows(grad_values, rows, columns, grad_v, token, head, 0)
                    multiply(False, features, whole(rows), columns, one, state, values_transposed, False, grad_phi)
                    add_feature_gradient(key_transposed, width, whole(rows), scale, grad_phi, found_transposed)
                    load_features(query_transposed, width, whole(rows), scale, phi)
                    multiply(False, features, whole(columns), rows, one, phi, grads, True, state)
                target = grad_k if reverse == 1 else grad_q
                for i in range(rows):
                    for d in range(width):
                        target[token + i, head, d] = found[i, d] + found_transposed[d, i]
        store_state(state, features, columns, grad_initial, sequence, head, 0)
