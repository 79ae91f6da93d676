"""Attention over chosen blocks on a CPU, forward and backward: one work item is a block of queries of one head.

Scores are formed with keys as rows: gathered keys are then multiplied as they lie, and softmax runs over rows with one
query in each lane. Heads that share an item are more queries of the same block.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.block_sparse.cpu_layout import TILE, block_of, flat, numbers, whole_numbers
from subquad.kernels.block_sparse.places import Places
from subquad.kernels.numba_math import FASTMATH, exp32, multiply, padded, whole


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    starts: Tensor,
    ends: Tensor,
    block_q: int,
    block_k: int,
    window: int,
    sinks: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, T, H, V)`` and log-sum-exps ``(B, T, H)``, float32; zero and -inf where nothing is seen."""
    places = Places.of(q.shape[1], k.shape[1], starts, ends, block_q, causal)
    out = np.zeros((*q.shape[:3], v.shape[3]), np.float32)
    mass = np.full(q.shape[:3], -np.inf, np.float32)
    operands = (*flat(q), *flat(k), *flat(v), whole_numbers(indices), whole_numbers(counts))
    sizes = (q.shape[3], k.shape[2], *numbers(places), block_k, window, sinks, np.float32(scale))
    pool.run_over_items(lambda a, b: _forward_items(a, b, *operands, *sizes, out, mass), counts.numel())
    return torch.from_numpy(out), torch.from_numpy(mass)


def backward(
    grad_out: Tensor,
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    starts: Tensor,
    ends: Tensor,
    block_q: int,
    block_k: int,
    window: int,
    sinks: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. One work item is a key head, whose keys many blocks of queries add to.

    Outputs and log-sum-exps are computed anew: with p the weights, ``dv = p^T do``, ``ds = p (do v^T - do . o + dm)``.
    """
    out, mass = forward(q, k, v, indices, counts, starts, ends, block_q, block_k, window, sinks, causal, scale)
    places = Places.of(q.shape[1], k.shape[1], starts, ends, block_q, causal)
    shift = (grad_mass - (grad_out * out).sum(-1)).contiguous()
    grads = [np.zeros(x.shape, np.float32) for x in (q, k, v)]
    operands = (*flat(q), *flat(k), *flat(v), *flat(grad_out), whole_numbers(indices), whole_numbers(counts))
    sizes = (q.shape[3], k.shape[2], *numbers(places), block_k, window, sinks, np.float32(scale))
    results = (mass.numpy(), shift.numpy(), *grads)
    pool.run_over_items(lambda a, b: _backward_items(a, b, *operands, *sizes, *results), k.shape[0] * k.shape[2])
    first, second, third = (torch.from_numpy(g).to(x.dtype) for g, x in zip(grads, (q, k, v)))
    return first, second, third


@njit
def _seen_keys(chosen, number_chosen, block_k, sinks, edge, limit, near, seen):
    """Keys of a block of queries, each once: those before ``edge``, seen by all its queries, then all up to ``limit``.

    How many there are before the edge, and in all. ``near`` says which of the later ones are sinks or chosen.
    """
    before = 0
    for i in range(limit - edge):
        near[i] = edge + i < sinks
    for key in range(min(sinks, limit, edge)):
        seen[before] = key
        before += 1
    for i in range(number_chosen):
        for key in range(max(chosen[i] * block_k, sinks), min((chosen[i] + 1) * block_k, limit)):
            if key >= edge:
                near[key - edge] = True
            else:
                seen[before] = key
                before += 1
    total = before
    for key in range(edge, limit):
        seen[total] = key
        total += 1
    return before, total


@njit
def _gather(source, base, step, seen, low, filled, width, target):
    """Rows of keys or values into a tile."""
    for s in range(filled):
        at = base + seen[low + s] * step
        row = target[s]
        for c in range(width):
            row[c] = source[at + c]


@njit
def _hide(weights, seen, low, filled, before, edge, near, now, window, many, group):
    """-inf for keys after a query, and for those before its window that were not chosen."""
    for s in range(max(0, before - low), filled):
        key = seen[low + s]
        for j in range(many):
            if key > now + j or (key <= now + j - window and not near[key - edge]):
                for i in range(group):
                    weights[s, i * many + j] = -np.inf


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(
    first_item,
    last_item,
    q,
    q_steps,
    k,
    k_steps,
    v,
    v_steps,
    indices,
    counts,
    width,
    key_heads,
    starts,
    ends,
    queries,
    all_keys,
    block_q,
    causal,
    block_k,
    window,
    sinks,
    scale,
    out,
    log_sum_exp,
):
    index_heads, blocks, heads, columns = indices.shape[1], indices.shape[2], out.shape[2], out.shape[3]
    group, shared = heads // index_heads, heads // key_heads
    rows = group * block_q
    turned = np.zeros((padded(width), padded(rows)), np.float32)
    tile_k = np.empty((TILE, padded(width)), np.float32)
    tile_v = np.zeros((TILE, padded(columns)), np.float32)
    weights = np.empty((TILE, padded(rows)), np.float32)
    read = np.empty((padded(rows), padded(columns)), np.float32)
    largest, mass = np.empty(padded(rows), np.float32), np.empty(padded(rows), np.float32)
    fade, top = np.empty(padded(rows), np.float32), np.empty(padded(rows), np.float32)
    near = np.empty(window + block_q, np.bool_)
    seen = np.empty(sinks + indices.shape[3] * block_k + window + block_q, np.int64)
    for item in range(first_item, last_item):
        block, head = item % blocks, item // blocks % index_heads
        row = item // (blocks * index_heads)
        start, length = starts[row], ends[row] - starts[row]
        first, last, now, end = block_of(queries, all_keys, start, ends[row], block_q, causal, block)
        if last < first:
            continue
        many = last - first + 1
        number = group * many
        for i in range(group):
            for j in range(many):
                at = row * q_steps[0] + (first + j) * q_steps[1] + (head * group + i) * q_steps[2]
                for c in range(width):
                    turned[c, i * many + j] = q[at + c] * scale
        largest[:] = -np.inf
        mass[:] = 0
        read[:] = 0
        edge, limit = max(0, now + 1 - window) if causal else length, min(end + 1, length)
        chosen, given = indices[row, head, block], counts[row, head, block]
        before, total = _seen_keys(chosen, given, block_k, sinks, edge, limit, near, seen)
        key_head = head * group // shared
        k_base = row * k_steps[0] + start * k_steps[1] + key_head * k_steps[2]
        v_base = row * v_steps[0] + start * v_steps[1] + key_head * v_steps[2]
        for low in range(0, total, TILE):
            filled = min(TILE, total - low)
            _gather(k, k_base, k_steps[1], seen, low, filled, width, tile_k)
            _gather(v, v_base, v_steps[1], seen, low, filled, columns, tile_v)
            multiply(False, filled, whole(number), width, np.float32(1), tile_k, turned, False, weights)
            if low + filled > before:
                _hide(weights, seen, low, filled, before, edge, near, now, window, many, group)
            _take(weights, filled, number, columns, largest, mass, fade, top, read)
            multiply(True, number, whole(columns), filled, np.float32(1), weights, tile_v, True, read)
        for i in range(group):
            for j in range(many):
                at = i * many + j
                if mass[at] > 0:
                    share = np.float32(1) / mass[at]
                    target = out[row, first + j, head * group + i]
                    for c in range(columns):
                        target[c] = read[at, c] * share
                    log_sum_exp[row, first + j, head * group + i] = largest[at] + np.log(mass[at])


@njit(fastmath=FASTMATH)
def _take(weights, filled, number, columns, largest, mass, fade, top, read):
    """Scores ``(filled, number)`` become weights beside the largest so far; what was read before fades to match."""
    lanes = whole(number)
    for i in range(lanes):
        top[i] = largest[i]
    for s in range(filled):
        own = weights[s]
        for i in range(lanes):
            top[i] = own[i] if own[i] > top[i] else top[i]
    for i in range(lanes):
        base = top[i] if top[i] > -np.inf else np.float32(0)
        fade[i] = exp32(largest[i] - base)
        mass[i] *= fade[i]
        largest[i] = top[i]
        top[i] = base
    for s in range(filled):
        own = weights[s]
        for i in range(lanes):
            own[i] = exp32(own[i] - top[i])
    for s in range(filled):
        own = weights[s]
        for i in range(lanes):
            mass[i] += own[i]
    for i in range(number):
        factor, own_read = fade[i], read[i]
        for c in range(whole(columns)):
            own_read[c] *= factor


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item,
    last_item,
    q,
    q_steps,
    k,
    k_steps,
    v,
    v_steps,
    grad_out,
    out_steps,
    indices,
    counts,
    width,
    key_heads,
    starts,
    ends,
    queries,
    all_keys,
    block_q,
    causal,
    block_k,
    window,
    sinks,
    scale,
    mass,
    shift,
    grad_q,
    grad_k,
    grad_v,
):
    index_heads, blocks, heads, columns = indices.shape[1], indices.shape[2], grad_q.shape[2], grad_v.shape[3]
    group, shared = heads // index_heads, heads // key_heads
    rows = group * block_q
    turned_q = np.zeros((padded(width), padded(rows)), np.float32)
    turned_o = np.zeros((padded(columns), padded(rows)), np.float32)
    own_q = np.zeros((padded(rows), padded(width)), np.float32)
    own_o = np.zeros((padded(rows), padded(columns)), np.float32)
    sum_q = np.empty((padded(rows), padded(width)), np.float32)
    tile_k = np.zeros((TILE, padded(width)), np.float32)
    tile_v = np.zeros((TILE, padded(columns)), np.float32)
    weights = np.empty((TILE, padded(rows)), np.float32)
    slopes = np.empty((TILE, padded(rows)), np.float32)
    share_k = np.empty((TILE, padded(width)), np.float32)
    share_v = np.empty((TILE, padded(columns)), np.float32)
    own_mass, own_shift = np.empty(padded(rows), np.float32), np.empty(padded(rows), np.float32)
    near = np.empty(window + block_q, np.bool_)
    seen = np.empty(sinks + indices.shape[3] * block_k + window + block_q, np.int64)
    for item in range(first_item, last_item):
        row, key_head = item // key_heads, item % key_heads
        start, length = starts[row], ends[row] - starts[row]
        k_base = row * k_steps[0] + start * k_steps[1] + key_head * k_steps[2]
        v_base = row * v_steps[0] + start * v_steps[1] + key_head * v_steps[2]
        for part in range(shared // group * blocks):
            block, head = part % blocks, key_head * (shared // group) + part // blocks
            first, last, now, end = block_of(queries, all_keys, start, ends[row], block_q, causal, block)
            if last < first:
                continue
            many = last - first + 1
            number = group * many
            for i in range(group):
                for j in range(many):
                    lane, query_head = i * many + j, head * group + i
                    at = row * q_steps[0] + (first + j) * q_steps[1] + query_head * q_steps[2]
                    for c in range(width):
                        own_q[lane, c] = turned_q[c, lane] = q[at + c] * scale
                    at = row * out_steps[0] + (first + j) * out_steps[1] + query_head * out_steps[2]
                    for c in range(columns):
                        own_o[lane, c] = turned_o[c, lane] = grad_out[at + c]
                    own_mass[lane] = mass[row, first + j, query_head]
                    own_shift[lane] = shift[row, first + j, query_head]
            for lane in range(number, whole(number)):
                own_mass[lane] = np.inf  # lanes without a query weigh nothing
                own_shift[lane] = 0
            sum_q[:] = 0
            edge, limit = max(0, now + 1 - window) if causal else length, min(end + 1, length)
            chosen, given = indices[row, head, block], counts[row, head, block]
            before, total = _seen_keys(chosen, given, block_k, sinks, edge, limit, near, seen)
            for low in range(0, total, TILE):
                filled = min(TILE, total - low)
                _gather(k, k_base, k_steps[1], seen, low, filled, width, tile_k)
                _gather(v, v_base, v_steps[1], seen, low, filled, columns, tile_v)
                multiply(False, filled, whole(number), width, np.float32(1), tile_k, turned_q, False, weights)
                if low + filled > before:
                    _hide(weights, seen, low, filled, before, edge, near, now, window, many, group)
                multiply(False, filled, whole(number), columns, np.float32(1), tile_v, turned_o, False, slopes)
                _slopes(weights, slopes, filled, whole(number), own_mass, own_shift)
                multiply(True, number, whole(width), filled, scale, slopes, tile_k, True, sum_q)
                multiply(False, filled, whole(width), number, np.float32(1), slopes, own_q, False, share_k)
                multiply(False, filled, whole(columns), number, np.float32(1), weights, own_o, False, share_v)
                for s in range(filled):
                    key = start + seen[low + s]
                    for c in range(width):
                        grad_k[row, key, key_head, c] += share_k[s, c]
                    for c in range(columns):
                        grad_v[row, key, key_head, c] += share_v[s, c]
            for i in range(group):
                for j in range(many):
                    for c in range(width):
                        grad_q[row, first + j, head * group + i, c] = sum_q[i * many + j, c]


@njit(fastmath=FASTMATH)
def _slopes(weights, slopes, filled, lanes, mass, shift):
    """Weights from scores, and gradients of scores from those of weights."""
    for s in range(filled):
        own, slope = weights[s], slopes[s]
        for i in range(lanes):
            own[i] = exp32(own[i] - mass[i])
        for i in range(lanes):
            slope[i] = own[i] * (slope[i] + shift[i])
