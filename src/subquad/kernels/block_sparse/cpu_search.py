"""The tree search for blocks of keys on a CPU: one work item is a block of queries of one head, all rounds of it."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.block_sparse.cpu_layout import TILE, block_of, flat, numbers
from subquad.kernels.block_sparse.places import Places
from subquad.kernels.numba_math import FASTMATH, multiply, padded, transpose, whole

CENTER, FIRST, LAST = range(3)
REPRESENTATIVES = {"center": CENTER, "first": FIRST, "last": LAST}


def search(
    q: Tensor,
    k: Tensor,
    places: Places,
    index_heads: int,
    budget: int,
    block_k: int,
    window: int,
    query_stride: int,
    representative: str,
) -> tuple[Tensor, Tensor]:
    """The chosen blocks ``(B, index_heads, blocks, m)``, ascending, -1 after the last, and how many there are."""
    shape = (q.shape[0], index_heads, places.blocks)
    indices = np.full((*shape, places.slots(budget, block_k, window)), -1, np.int32)
    counts = np.zeros(shape, np.int32)
    operands = (*flat(q), *flat(k), q.shape[2], q.shape[3], k.shape[2], *numbers(places))
    options = (block_k, window, query_stride, REPRESENTATIVES[representative], budget // block_k)
    pool.run_over_items(lambda a, b: _items(a, b, *operands, *options, indices, counts), counts.size)
    return torch.from_numpy(indices), torch.from_numpy(counts)


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _items(
    first_item,
    last_item,
    q,
    q_steps,
    k,
    k_steps,
    heads,
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
    stride,
    representative,
    most,
    indices,
    counts,
):
    index_heads, blocks = indices.shape[1], indices.shape[2]
    group, shared = heads // index_heads, heads // key_heads
    rows = group * ((block_q + stride - 1) // stride)
    turned = np.zeros((padded(width), padded(rows)), np.float32)
    gathered = np.empty((TILE, padded(width)), np.float32)
    scores = np.empty((padded(TILE), padded(rows)), np.float32)
    by_query = np.empty((padded(rows), padded(TILE)), np.float32)
    owner = np.empty(TILE, np.int64)
    node, size = np.empty(most, np.int64), np.empty(most, np.int64)
    child, child_size = np.empty(2 * most, np.int64), np.empty(2 * most, np.int64)
    best, ordered = np.empty(2 * most, np.float32), np.empty(2 * most, np.float32)
    for item in range(first_item, last_item):
        block, head = item % blocks, item // blocks % index_heads
        row = item // (blocks * index_heads)
        first, last, _, now = block_of(queries, all_keys, starts[row], ends[row], block_q, causal, block)
        span = now + 1 - window
        if last < first or span <= 0:
            continue
        total = (span + block_k - 1) // block_k
        chosen = indices[row, head, block]
        counts[row, head, block] = min(total, most)
        if total <= most:
            for i in range(total):
                chosen[i] = i
            continue
        scored = (last - first) // stride + 1
        number = group * scored
        for i in range(group):
            for j in range(scored):
                at = row * q_steps[0] + (last - j * stride) * q_steps[1] + (head * group + i) * q_steps[2]
                for c in range(width):
                    turned[c, i * scored + j] = q[at + c]
        base = row * k_steps[0] + starts[row] * k_steps[1] + head * group // shared * k_steps[2]
        nodes, deepest = most, 0
        for i in range(most):
            node[i] = total * i // most
            size[i] = total * (i + 1) // most - node[i]
            deepest = max(deepest, size[i])
        while deepest > 1:
            children = 0
            for i in range(nodes):
                half = size[i] // 2
                if half > 0:
                    child[children], child_size[children] = node[i], half
                    children += 1
                child[children], child_size[children] = node[i] + half, size[i] - half
                children += 1
            best[:children] = -np.inf
            filled = 0
            for i in range(children):
                at = child[i]
                if representative == CENTER:
                    at += child_size[i] // 2
                elif representative == LAST:
                    at += child_size[i] - 1
                for key in range(at * block_k, min((at + 1) * block_k, span)):
                    source, target = base + key * k_steps[1], gathered[filled]
                    for c in range(width):
                        target[c] = k[source + c]
                    owner[filled] = i
                    filled += 1
                    if filled == TILE:
                        multiply(False, filled, whole(number), width, np.float32(1), gathered, turned, False, scores)
                        _largest(scores, filled, number, by_query, owner, best)
                        filled = 0
            multiply(False, filled, whole(number), width, np.float32(1), gathered, turned, False, scores)
            _largest(scores, filled, number, by_query, owner, best)
            nodes, deepest = _keep(best, ordered, child, child_size, children, most, node, size)
        for i in range(nodes):
            chosen[i] = node[i]


@njit(fastmath=FASTMATH)
def _largest(scores, filled, number, by_query, owner, best):
    """Raises each child's best score to the largest of its keys with any of the queries."""
    transpose(scores, whole(filled), whole(number), by_query)
    largest = by_query[0]
    for i in range(1, number):
        own = by_query[i]
        for j in range(filled):
            largest[j] = own[j] if own[j] > largest[j] else largest[j]
    for j in range(filled):
        if largest[j] > best[owner[j]]:
            best[owner[j]] = largest[j]


@njit
def _ranked(values, count, rank):
    """The value that stands at ``rank`` in ascending order, by quickselect; the order of values is lost."""
    low, high = 0, count - 1
    while low < high:
        pivot, i, j = values[(low + high) // 2], low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if rank <= j:
            high = j
        elif rank >= i:
            low = i
        else:
            break
    return values[rank]


@njit
def _keep(best, ordered, child, child_size, children, most, node, size):
    """The ``most`` best children, of equals the earlier ones, in their order: how many, and the largest size."""
    for i in range(children):
        ordered[i] = best[i]
    limit = _ranked(ordered, children, children - most)  # never fewer children than nodes, and always `most` nodes
    equals = most
    for i in range(children):
        if best[i] > limit:
            equals -= 1
    kept, deepest = 0, 0
    for i in range(children):
        keep = best[i] > limit
        if not keep and best[i] == limit and equals > 0:
            equals -= 1
            keep = True
        if keep:
            node[kept], size[kept] = child[i], child_size[i]
            deepest = max(deepest, child_size[i])
            kept += 1
    return kept, deepest
