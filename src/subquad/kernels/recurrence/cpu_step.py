"""One token of the shared recurrence on a CPU, for decoding: each entry of the state is read once and written once.

The read needs no second pass over the new state: o = (e^g S)^T q + (w . q) d, so S^T k and S^T q are taken together.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from subquad.kernels.numba_math import FASTMATH, exp32
from subquad.kernels.recurrence.checks import check_gates
from subquad.kernels.recurrence.cpu_chunks import MIN_LOG_DECAY, empty, float32_array, max_with_nan, refuse


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output of one token and the state after it (a fresh tensor).

    Args:
        q: ``(B, H, K)``; k ``(B, n, H, K)``, v ``(B, n, H, V)``: the token's n updates, read after the last.
        log_decay: None, ``(H,)``, ``(B, H)`` or ``(B, H, K)`` float32, at most 0; applied once, before all updates.
        beta: ``(B, n, H)`` float32 in [0, 2] for the delta rule; None writes without erasing.
        state: ``(B, H, K, V)`` float32, not changed.

    Returns:
        ``o (B, H, V)`` in v's dtype and the new state.

    Raises:
        ValueError: shapes that do not fit, log_decay above 0, beta outside [0, 2].
    """
    if q.dim() != 3 or k.dim() != 4 or v.dim() != 4:
        refuse("q, k, v", f"of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}",
               "(batch, heads, K), (batch, updates, heads, K) and (batch, updates, heads, V) are needed")  # fmt: skip
    batch, heads, width = q.shape
    updates, columns = v.shape[1], v.shape[3]
    if k.shape != (batch, updates, heads, width) or v.shape != (batch, updates, heads, columns) or updates < 1:
        refuse("k, v", f"of shapes {tuple(k.shape)}, {tuple(v.shape)}", f"they must fit q of shape {tuple(q.shape)}")
    if state.shape != (batch, heads, width, columns):
        refuse("state", f"of shape {tuple(state.shape)}", f"{(batch, heads, width, columns)} is needed")
    if beta is None:
        if updates > 1:
            refuse("beta", None, f"{updates} updates per token need it")
    elif beta.shape != (batch, updates, heads):
        refuse("beta", f"of shape {tuple(beta.shape)}", f"{(batch, updates, heads)} is needed")
    out = torch.empty((batch, heads, columns))
    after = torch.empty((batch, heads, width, columns))
    outside = step_into(
        float32_array(q),
        float32_array(k),
        float32_array(v),
        _NONE if log_decay is None else _gates(log_decay, batch, heads, width),
        _NONE if beta is None else float32_array(beta),
        float32_array(state),
        out.numpy(),
        after.numpy(),
        float(scale),
    )
    if outside:
        check_gates(log_decay, beta)
    return out if v.dtype == torch.float32 else out.to(v.dtype), after


_NONE = empty(3)


def _gates(log_decay: Tensor, batch: int, heads: int, width: int) -> np.ndarray:
    """``(B or 1, H, K or 1)``."""
    if log_decay.shape == (batch, heads, width):
        return float32_array(log_decay)
    if log_decay.shape == (batch, heads) or log_decay.shape == (heads,):
        return float32_array(log_decay).reshape(-1, heads, 1)
    forms = f"({heads},), ({batch}, {heads}) or ({batch}, {heads}, {width})"
    return refuse("log_decay", f"of shape {tuple(log_decay.shape)}", f"{forms} is needed")


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def step_into(q, k, v, log_decay, beta, state, out, after, scale):
    """Fill ``out`` and ``after``; return whether a gate is outside its range. Called by the mixers' step kernels too.

    ``q (B, H, K)``, ``k (B, n, H, K)``, ``v (B, n, H, V)``, ``log_decay (B or 1, H, K or 1)``, ``beta (B, n, H)``; an
    absent gate is empty.
    """
    batch, updates, heads, columns = v.shape
    width = q.shape[2]
    erase, outside = beta.shape[0] > 0, False
    decays = np.ones(width, np.float32)
    read = np.empty(columns, np.float32)
    update = np.empty(columns, np.float32)
    for b in range(batch):
        for h in range(heads):
            if log_decay.shape[0] > 0:
                row = min(b, log_decay.shape[0] - 1)
                for d in range(width):
                    gate = log_decay[row, h, min(d, log_decay.shape[2] - 1)]
                    outside |= gate > 0
                    decays[d] = exp32(max_with_nan(gate, MIN_LOG_DECAY))
            for j in range(updates):
                source = state if j == 0 else after
                if j == 1:
                    decays[:] = 1
                weight = np.float32(1)
                read[:] = 0
                update[:] = 0
                if erase:
                    weight = beta[b, j, h]
                    outside |= weight < 0 or weight > 2
                    for a in range(width):
                        key, query = k[b, j, h, a] * decays[a], q[b, h, a] * decays[a]
                        for c in range(columns):
                            update[c] -= key * source[b, h, a, c]
                        for c in range(columns):
                            read[c] += query * source[b, h, a, c]
                match = np.float32(0)
                for a in range(width):
                    match += q[b, h, a] * k[b, j, h, a]
                for c in range(columns):
                    update[c] = weight * (v[b, j, h, c] + update[c])
                for a in range(width):
                    key, decay = k[b, j, h, a], decays[a]
                    for c in range(columns):
                        after[b, h, a, c] = decay * source[b, h, a, c] + key * update[c]
                if erase:
                    for c in range(columns):
                        read[c] += match * update[c]
                else:
                    for a in range(width):
                        query = q[b, h, a]
                        for c in range(columns):
                            read[c] += query * after[b, h, a, c]
            for c in range(columns):
                out[b, h, c] = np.float32(scale) * read[c]
    return outside
