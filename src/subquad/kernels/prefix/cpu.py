"""Means over prefixes on a CPU, token after token in numba: one exponential per token and head, and V multiply-adds.

A scan of logarithmic depth would do more work for parallelism that a CPU does not have. Heads of a token lie beside
each other, so all heads of a sequence are one work item, and memory is read once in order; a sequence's heads are
divided only where threads would be idle.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, exp32
from subquad.kernels.recurrence.checks import check_offsets


def _uninitialised(*shape: int) -> Tensor:
    """float32 in memory that numpy asks for: large arrays come in huge pages, which torch's do not."""
    return torch.from_numpy(np.empty(shape, np.float32))


def _layout(scores: Tensor, cu_seqlens: Tensor | None) -> tuple[np.ndarray, int, int]:
    """Where sequences start and end in the flattened tokens, how many there are, and into how many parts heads go."""
    batch, time, heads = scores.shape
    if cu_seqlens is None:
        starts = np.arange(batch + 1, dtype=np.int64) * time
    else:
        starts = np.asarray(check_offsets(cu_seqlens, time), dtype=np.int64)
    sequences = len(starts) - 1
    return starts, sequences, min(heads, -(-torch.get_num_threads() // sequences))


def forward(
    scores: Tensor,
    values: Tensor,
    maximum: Tensor,
    denominator: Tensor,
    numerator: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means ``(B, T, H, V)``, the last triple, and what ``backward`` wants (empty unless ``save``).

    ``scores (B, T, H)``, ``values (B, T, H, V)``, ``maximum``, ``denominator (N, H)``, ``numerator (N, H, V)``,
    contiguous float32; N = B or the number of packed sequences. Saved are the maximum and the
    denominator at every token, ``(2, B, T, H)``.
    """
    batch, time, heads, width = values.shape
    starts, sequences, parts = _layout(scores, cu_seqlens)
    out = _uninitialised(batch, time, heads, width)
    saved = _uninitialised(2, batch, time, heads) if save else _uninitialised(2, 0, heads)
    last = [x.clone() for x in (maximum, denominator, numerator)]
    arrays = [
        scores.numpy().reshape(-1, heads),
        values.numpy().reshape(-1, heads, width),
        *(x.numpy() for x in last),
        out.numpy().reshape(-1, heads, width),
        saved.numpy().reshape(2, batch * time if save else 0, heads),
    ]
    pool.run_over_items(lambda a, b: _forward_items(a, b, starts, parts, *arrays), sequences * parts)
    return out, last[0], last[1], last[2], saved if save else saved.flatten()


def backward(
    grad_o: Tensor,
    grad_maximum: Tensor,
    grad_denominator: Tensor,
    grad_numerator: Tensor,
    scores: Tensor,
    values: Tensor,
    maximum: Tensor,
    denominator: Tensor,
    numerator: Tensor,
    o: Tensor,
    last_maximum: Tensor,
    last_denominator: Tensor,
    last_numerator: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scores, values and the first triple, the last maximum held fixed (the caller adds its share).

    With p_t = e^{s_t - L_t} and d_t = e^{L_t - L_{t+1}}, all in (0, 1], the sums run from the end to the start::

        G_t = do_t + d_t G_{t+1}      C_t = do_t . o_t + d_t C_{t+1}
        dv_t = p_t G_t                ds_t = p_t (v_t . G_t - C_t)
    """
    batch, time, heads, width = values.shape
    starts, sequences, parts = _layout(scores, cu_seqlens)
    grad_scores = _uninitialised(batch, time, heads)
    grad_values = _uninitialised(batch, time, heads, width)
    grad_first = [torch.empty_like(maximum), grad_denominator.clone(), grad_numerator.clone()]
    arrays = [
        grad_o.numpy().reshape(-1, heads, width),
        scores.numpy().reshape(-1, heads),
        values.numpy().reshape(-1, heads, width),
        maximum.numpy(),
        denominator.numpy(),
        numerator.numpy(),
        o.numpy().reshape(-1, heads, width),
        last_denominator.numpy(),
        saved.numpy().reshape(2, -1, heads),
        grad_scores.numpy().reshape(-1, heads),
        grad_values.numpy().reshape(-1, heads, width),
        *(x.numpy() for x in grad_first),
    ]
    pool.run_over_items(lambda a, b: _backward_items(a, b, starts, parts, *arrays), sequences * parts)
    return grad_scores, grad_values, grad_first[0], grad_first[1], grad_first[2]


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(first_item, last_item, starts, parts, scores, values, maximum, denominator, numerator, out, saved):
    heads, width = values.shape[1], values.shape[2]
    zero, one = np.float32(0), np.float32(1)
    for item in range(first_item, last_item):
        sequence, part = item // parts, item % parts
        low, high = heads * part // parts, heads * (part + 1) // parts
        for token in range(starts[sequence], starts[sequence + 1]):
            for head in range(low, high):
                score, largest = scores[token, head], maximum[sequence, head]
                fade = weight = one
                if score > largest:  # all sums so far shrink
                    fade = exp32(largest - score)
                    maximum[sequence, head] = largest = score
                elif score == -np.inf:
                    weight = zero
                else:
                    weight = exp32(score - largest)
                mass = denominator[sequence, head] * fade + weight
                denominator[sequence, head] = mass
                share = one / mass if mass != 0 else zero
                value, mean, total = values[token, head], out[token, head], numerator[sequence, head]
                for c in range(width):
                    x = total[c] * fade + weight * value[c]
                    total[c] = x
                    mean[c] = x * share
                if saved.shape[1] > 0:
                    saved[0, token, head] = largest
                    saved[1, token, head] = mass


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item,
    last_item,
    starts,
    parts,
    grad_out,
    scores,
    values,
    maximum,
    denominator,
    numerator,
    out,
    last_denominator,
    saved,
    grad_scores,
    grad_values,
    grad_maximum,
    grad_denominator,
    grad_numerator,
):
    heads, width = values.shape[1], values.shape[2]
    zero = np.float32(0)
    sums = np.empty((heads, width), np.float32)
    dots = np.empty(heads, np.float32)
    for item in range(first_item, last_item):
        sequence, part = item // parts, item % parts
        low, high = heads * part // parts, heads * (part + 1) // parts
        begin, end = starts[sequence], starts[sequence + 1]
        for head in range(low, high):
            mass = last_denominator[sequence, head] if begin < end else np.float32(1)
            dots[head] = -mass * grad_denominator[sequence, head]
            for c in range(width):
                sums[head, c] = mass * grad_numerator[sequence, head, c]
        for token in range(end - 1, begin - 1, -1):
            for head in range(low, high):
                largest, mass = saved[0, token, head], saved[1, token, head]
                fade = np.float32(1)
                if token + 1 < end:
                    later = saved[1, token + 1, head]
                    fade = zero if later == 0 else mass / later  # zero too where this token's mass is
                    if saved[0, token + 1, head] != largest:
                        fade = fade * exp32(largest - saved[0, token + 1, head])
                weight = zero
                if scores[token, head] != -np.inf:
                    weight = exp32(scores[token, head] - largest) / mass
                seen = zero if mass == 0 else np.float32(1)  # nothing but masked tokens so far: the mean is constant
                total, upstream = sums[head], grad_out[token, head]
                value, mean, grad_value = values[token, head], out[token, head], grad_values[token, head]
                of_mean = of_value = zero
                for c in range(width):
                    x = total[c] * fade + upstream[c] * seen
                    total[c] = x
                    grad_value[c] = weight * x
                    of_mean += upstream[c] * mean[c]
                    of_value += value[c] * x
                dots[head] = dots[head] * fade + of_mean * seen
                grad_scores[token, head] = weight * (of_value - dots[head])
        for head in range(low, high):
            fade = zero
            if begin == end:  # a sequence without tokens
                fade = np.float32(1)
            elif maximum[sequence, head] != -np.inf and saved[1, begin, head] != 0:
                fade = exp32(maximum[sequence, head] - saved[0, begin, head]) / saved[1, begin, head]
            dot = zero
            for c in range(width):
                grad_numerator[sequence, head, c] = fade * sums[head, c]
                dot += numerator[sequence, head, c] * grad_numerator[sequence, head, c]
            grad_denominator[sequence, head] = -fade * dots[head]
            grad_maximum[sequence, head] = dot + denominator[sequence, head] * grad_denominator[sequence, head]
