"""Causal Taylor attention on a CPU, chunk by chunk in numba: the features of a chunk are built in cache and forgotten.

With P = 1 + s + s^2 / 2 below the diagonal of a chunk and Phi the features of its tokens, S the state before it::

    O = P V + Phi_q S        S <- S + Phi_k^T V

One work item is one head of one sequence. Everything is held transposed, ``(features, tokens)``, so that building a row
of features is one vector product of two rows.
"""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, multiply, padded, transpose, whole
from subquad.kernels.recurrence.cpu_chunks import (
    CHUNK_ROWS,
    apply_lower,
    describe,
    empty,
    float32_array,
    load_rows,
    load_state,
    lower_product,
    refuse,
    store_rows,
    store_state,
    uninitialised,
)
from subquad.kernels.taylor.cpu_backward import backward
from subquad.kernels.taylor.cpu_features import load_features, polynomial
from subquad.kernels.taylor.features import feature_width

__all__ = ["backward", "forward", "step"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, T, H, V)`` and final states ``(N, H, F, V)``, float32.

    Args:
        q, k: ``(B, T, H, d)``; float32, bfloat16 or float16, computed in float32.
        v: ``(B, T, H, V)``.
        initial_state: ``(N, H, F, V)`` float32 or None for zeros; N = B or the number of packed sequences.
        cu_seqlens: ``(N + 1,)`` first token of each packed sequence and the end of the last, with B = 1; or None.
        scale: of q . k, above 0.

    Raises:
        ValueError: shapes that do not fit, ``cu_seqlens`` that does not rise from 0 to T.
    """
    form = describe(q, k, v, cu_seqlens, CHUNK_ROWS)
    features = feature_width(form.key_width)
    shape = (form.sequences, form.heads, features, form.value_width)
    if initial_state is not None and initial_state.shape != shape:
        refuse("initial_state", f"of shape {tuple(initial_state.shape)}", f"{shape} is needed")
    out, final_state = uninitialised(*v.shape), uninitialised(*shape)

    def work(first: int, last: int) -> None:
        _forward_items(
            first,
            last,
            float32_array(q).reshape(form.tokens, form.heads, -1),
            float32_array(k).reshape(form.tokens, form.heads, -1),
            float32_array(v).reshape(form.tokens, form.heads, -1),
            empty(4) if initial_state is None else float32_array(initial_state),
            form.starts,
            out.numpy().reshape(form.tokens, form.heads, -1),
            final_state.numpy(),
            features,
            np.float32(scale),
        )

    pool.run_over_items(work, form.sequences * form.heads)
    return out, final_state


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(first_item, last_item, q, k, v, initial_state, starts, out, final_state, features, scale):
    heads, width, columns = q.shape[1], q.shape[2], v.shape[2]
    chunk, one = CHUNK_ROWS, np.float32(1)
    state = np.zeros((padded(features), padded(columns)), np.float32)
    query = np.zeros((padded(chunk), padded(width)), np.float32)
    key = np.zeros((padded(chunk), padded(width)), np.float32)
    query_transposed = np.zeros((padded(width), padded(chunk)), np.float32)
    key_transposed = np.zeros((padded(width), padded(chunk)), np.float32)
    phi = np.zeros((padded(features), padded(chunk)), np.float32)
    scores = np.zeros((padded(chunk), padded(chunk)), np.float32)
    values = np.zeros((padded(chunk), padded(columns)), np.float32)
    products = np.zeros((padded(chunk), padded(columns)), np.float32)

    for item in range(first_item, last_item):
        head, sequence = item % heads, item // heads
        if initial_state.shape[0] > 0:
            load_state(initial_state, sequence, head, 0, features, columns, state)
        else:
            state[:] = 0
        for token in range(starts[sequence], starts[sequence + 1], chunk):
            rows = min(chunk, starts[sequence + 1] - token)
            load_rows(q, token, rows, head, 0, width, query)
            load_rows(k, token, rows, head, 0, width, key)
            load_rows(v, token, rows, head, 0, columns, values)
            transpose(query, whole(rows), whole(width), query_transposed)
            transpose(key, whole(rows), whole(width), key_transposed)
            lower_product(0, rows, 1, rows, width, query, key_transposed, scores)
            polynomial(scores, rows, scale)
            load_features(query_transposed, width, whole(rows), scale, phi)
            multiply(True, rows, whole(columns), features, one, phi, state, False, products)
            apply_lower(0, rows, 1, rows, whole(columns), scores, values, products)
            store_rows(products, rows, columns, out, token, head, 0)
            load_features(key_transposed, width, whole(rows), scale, phi)
            multiply(False, features, whole(columns), rows, one, phi, values, True, state)
        store_state(state, features, columns, final_state, sequence, head, 0)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, normalizer: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token: each entry of the state is read once and written once.

    Args:
        q, k: ``(B, H, d)``; v ``(B, H, V)``.
        state: ``(B, H, F, V)`` float32, not changed; normalizer ``(B, H, F)``.

    Returns:
        The weighted sum of values ``(B, H, V)`` and the sum of weights ``(B, H)``, not divided, then the new state and
        normaliser.
    """
    batch, heads, width = q.shape
    columns, features = v.shape[2], feature_width(width)
    shape = (batch, heads, features, columns)
    if k.shape != q.shape or v.shape[:2] != q.shape[:2] or state.shape != shape or normalizer.shape != shape[:3]:
        refuse(
            "k, v, state, normalizer",
            f"of shapes {tuple(k.shape)}, {tuple(v.shape)}, {tuple(state.shape)}, {tuple(normalizer.shape)}",
            f"they must fit q of shape {tuple(q.shape)}",
        )
    out, total = uninitialised(batch, heads, columns), uninitialised(batch, heads)
    after, after_normalizer = uninitialised(*shape), uninitialised(*shape[:3])
    _step(
        float32_array(q),
        float32_array(k),
        float32_array(v),
        float32_array(state),
        float32_array(normalizer),
        out.numpy(),
        total.numpy(),
        after.numpy(),
        after_normalizer.numpy(),
        np.float32(scale),
    )
    return out, total, after, after_normalizer


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _step(q, k, v, state, normalizer, out, total, after, after_normalizer, scale):
    batch, heads, width = q.shape
    features, columns = state.shape[2], state.shape[3]
    pair = np.empty((width, 2), np.float32)
    phi = np.empty((features, 2), np.float32)
    read = np.empty(columns, np.float32)
    for b in range(batch):
        for h in range(heads):
            for i in range(width):
                pair[i, 0] = q[b, h, i]
                pair[i, 1] = k[b, h, i]
            load_features(pair, width, 2, scale, phi)
            read[:] = 0
            weight = np.float32(0)
            for f in range(features):
                query, key = phi[f, 0], phi[f, 1]
                for c in range(columns):
                    after[b, h, f, c] = state[b, h, f, c] + key * v[b, h, c]
                for c in range(columns):
                    read[c] += query * after[b, h, f, c]
                after_normalizer[b, h, f] = normalizer[b, h, f] + key
                weight += query * after_normalizer[b, h, f]
            for c in range(columns):
                out[b, h, c] = read[c]
            total[b, h] = weight
