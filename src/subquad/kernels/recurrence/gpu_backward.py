"""Triton kernels of the recurrence's backward pass, and their launches.

With R the gradient of the state after a chunk and Y = (I + L)^-T dD: ``reverse_kernel`` walks over the chunks from the
right and leaves R for each (and dv = Y if there is an erase); ``value_kernel`` forms dv without one;
``gradient_kernel`` gives everything else, all chunks at once. Scores and the inverse are computed again, states and
updates come from the forward pass.

The gradient of a log decay at row t is the sum over the pairs i >= t > j that t separates. Terms of order one must not
cancel in it, or nothing is left of it under strong decays. So the diagonal i = j, which no decay touches, stays out;
what crosses an end of the chunk is summed on its own side of t; and one decay per row sums the separated pairs alone.
Channel-wise decay takes differences among pairs i > j inside a chunk alone, all of them as small as the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.recurrence.gpu_forward import scores_and_inverse, state_tiles
from subquad.kernels.recurrence.gpu_tiles import (
    Layout,
    chunk_decays,
    load_beta,
    load_log_decay,
    load_lower,
    load_tile,
    matmul,
    pair_decays,
    separated,
    sequence_rows,
    slot_rows,
    state_pointers,
    store_tile,
    widen,
)


@triton.jit(do_not_specialize=["rows", "slots_per_sequence"])
def reverse_kernel(
    q,
    k,
    grad_o,
    log_decay,
    beta,
    scores,
    inverse,
    grad_final_state,
    grad_states,
    grad_v,
    grad_initial_state,
    cu_seqlens,
    rows,
    slots_per_sequence,
    heads,
    scale,
    V,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    UPDATES: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per (sequence, head), V tile and K tile, as ``state_kernel``.

    Writes the gradient of the state after each chunk, that of the initial state, and with an erase dv.
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    channels = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = (channels < K)[:, None] & (values < V)[None, :]
    begin, end, slot, _ = sequence_rows(sequence, cu_seqlens, rows, slots_per_sequence, CHUNK, UPDATES)

    source = state_pointers(grad_final_state, sequence, head, heads, channels, values, K, V)
    grad_state = tl.load(source, mask=tile, other=0.0)
    chunks = tl.cdiv(end - begin, CHUNK)
    for done in range(chunks):
        chunk = chunks - 1 - done
        first = begin + chunk * CHUNK
        tl.store(state_pointers(grad_states, slot + chunk, head, heads, channels, values, K, V), grad_state, mask=tile)
        row = first + tl.arange(0, CHUNK)
        inside = row < end
        reads = inside & (row % UPDATES == UPDATES - 1)
        queries = load_tile(q, row // UPDATES, reads, head, heads, channels, K)
        grad_output = load_tile(grad_o, row // UPDATES, reads, head, heads, values, V)
        since_start, until_end, over_all = chunk_decays(
            log_decay, first, end, head, heads, channels, K, CHUNK, UPDATES, DECAY
        )
        earlier = matmul(tl.trans(queries * since_start * scale), grad_output, DOT, PRECISION)
        if beta is not None:
            keys = load_tile(k, row, inside, head, heads, channels, K)
            write = keys * until_end * load_beta(beta, row, end, head, heads)[:, None]
            within = load_lower(scores, row // UPDATES, reads, head, heads, CHUNK)
            grad_update = matmul(tl.trans(within), grad_output, DOT, PRECISION)
            grad_update += matmul(write, grad_state, DOT, PRECISION)
            solve = load_lower(inverse, row, inside, head, heads, CHUNK)
            grad_value = tl.dot(tl.trans(solve), grad_update, input_precision="tf32x3")
            store_tile(grad_v, grad_value, row, inside, head, heads, values, V)
            earlier -= matmul(tl.trans(keys * since_start), grad_value, DOT, PRECISION)
        grad_state = grad_state * over_all[:, None] + earlier
    tl.store(state_pointers(grad_initial_state, sequence, head, heads, channels, values, K, V), grad_state, mask=tile)


@triton.jit(do_not_specialize=["rows", "slots_per_sequence"])
def value_kernel(
    k,
    grad_o,
    log_decay,
    scores,
    grad_states,
    grad_v,
    slot_bounds,
    rows,
    slots_per_sequence,
    heads,
    V,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    UPDATES: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per (slot, head) and V tile, without an erase: dv = A^T do + (k e^(G_C - G)) R."""
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    first, end = slot_rows(slot, slot_bounds, rows, slots_per_sequence, CHUNK)
    if first >= end:
        return
    row = first + tl.arange(0, CHUNK)
    inside = row < end
    reads = inside & (row % UPDATES == UPDATES - 1)
    within = load_lower(scores, row // UPDATES, reads, head, heads, CHUNK)
    grad_output = load_tile(grad_o, row // UPDATES, reads, head, heads, values, V)
    grad_value = matmul(tl.trans(within), grad_output, DOT, PRECISION)
    for start in range(0, K, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        keys = load_tile(k, row, inside, head, heads, channels, K)
        _, until_end, _ = chunk_decays(log_decay, first, end, head, heads, channels, K, CHUNK, UPDATES, DECAY)
        source = state_pointers(grad_states, slot, head, heads, channels, values, K, V)
        grad_state = tl.load(source, mask=(channels < K)[:, None] & (values < V)[None, :], other=0.0)
        grad_value += matmul(keys * until_end, grad_state, DOT, PRECISION)
    store_tile(grad_v, grad_value, row, inside, head, heads, values, V)


@triton.jit
def _sum_before(rows_tile, CHUNK: tl.constexpr):
    """Sum over the rows above each row, itself excluded (not by subtracting it: it may be all there is)."""
    index = tl.arange(0, CHUNK)
    above = tl.broadcast_to(tl.maximum(index - 1, 0)[:, None], rows_tile.shape)
    shifted = tl.where(index[:, None] > 0, tl.gather(rows_tile, above, axis=0), 0.0)
    return tl.cumsum(shifted, axis=0)


@triton.jit(do_not_specialize=["rows", "slots_per_sequence", "total_rows"])
def gradient_kernel(
    q,
    k,
    grad_o,
    update,
    grad_v,
    log_decay,
    beta,
    states,
    grad_states,
    grad_q,
    grad_k,
    grad_log_decay,
    grad_beta,
    slot_bounds,
    rows,
    total_rows,
    slots_per_sequence,
    heads,
    scale,
    V,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    UPDATES: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program per (slot, head) and K tile: dq, dk, and this tile's shares of dbeta and dlog_decay.

    ``grad_beta`` is (K tiles, rows, H), ``grad_log_decay`` (K tiles, tokens, H), or (tokens, H, K) if channel-wise.
    """
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    channels = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    first, end = slot_rows(slot, slot_bounds, rows, slots_per_sequence, CHUNK)
    if first >= end:
        return
    index = tl.arange(0, CHUNK)
    row = first + index
    inside = row < end
    reads = inside & (row % UPDATES == UPDATES - 1)

    # What the tokens exchange with each other (dA, dL) and with the states at both ends of the chunk.
    grad_scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_coupling = tl.zeros((CHUNK, CHUNK), tl.float32)
    grad_queries = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    grad_keys = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    grad_write = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    passing = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, V, BLOCK_V):
        values = start + tl.arange(0, BLOCK_V)
        tile = (channels < K)[:, None] & (values < V)[None, :]
        state = tl.load(state_pointers(states, slot, head, heads, channels, values, K, V), mask=tile, other=0.0)
        grad_state = tl.load(
            state_pointers(grad_states, slot, head, heads, channels, values, K, V), mask=tile, other=0.0
        )
        grad_output = load_tile(grad_o, row // UPDATES, reads, head, heads, values, V)
        written = tl.trans(load_tile(update, row, inside, head, heads, values, V))
        grad_scores += matmul(grad_output, written, DOT, PRECISION)
        grad_queries += matmul(grad_output, tl.trans(state), DOT, PRECISION)
        grad_write += matmul(tl.trans(written), tl.trans(grad_state), DOT, PRECISION)
        if beta is not None:
            grad_value = load_tile(grad_v, row, inside, head, heads, values, V)
            grad_coupling -= matmul(grad_value, written, DOT, PRECISION)
            grad_keys -= matmul(grad_value, tl.trans(state), DOT, PRECISION)
        if DECAY != "none":
            passing += tl.sum(state * grad_state, axis=1)

    queries = load_tile(q, row // UPDATES, reads, head, heads, channels, K)
    keys = load_tile(k, row, inside, head, heads, channels, K)
    strength = load_beta(beta, row, end, head, heads)
    since_start, until_end, over_all = chunk_decays(
        log_decay, first, end, head, heads, channels, K, CHUNK, UPDATES, DECAY
    )
    grad_queries *= since_start * scale
    grad_keys *= since_start
    grad_write *= until_end
    grad_scores *= scale
    if DECAY != "none":
        passing *= over_all
        from_end = grad_write * keys * strength[:, None]

    below = index[:, None] > index[None, :]
    diagonal = index[:, None] == index[None, :]
    own = tl.sum(tl.where(diagonal, grad_scores, 0.0), axis=1)[:, None]
    if DECAY == "vector":
        log = load_log_decay(log_decay, row, end, head, heads, channels, K, UPDATES, DECAY)
        since = tl.exp(log)
        until = tl.full((CHUNK, BLOCK_K), 1.0, tl.float32)
        from_within = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        for level in tl.static_range(LEVELS):
            parted = separated(level, CHUNK)
            faded = keys * until
            scores_part = tl.where(parted, grad_scores, 0.0)
            grad_queries += since * matmul(scores_part * strength[None, :], faded, DOT, PRECISION)
            part = matmul(tl.trans(scores_part), queries * since, DOT, PRECISION)
            if beta is not None:
                coupling_part = tl.where(parted, grad_coupling, 0.0)
                grad_keys += since * matmul(coupling_part * strength[None, :], faded, DOT, PRECISION)
                part += matmul(tl.trans(coupling_part), keys * since, DOT, PRECISION)
            from_within += until * part
            since, until = widen(since, until, level, CHUNK)
        grad_write += from_within
        crossing = grad_queries * queries + grad_keys * keys - from_within * keys * strength[:, None]
        grad_log = tl.cumsum(crossing, axis=0, reverse=True) + _sum_before(from_end, CHUNK) + passing[None, :]
        applies = inside & (row % UPDATES == 0)
        store_tile(grad_log_decay, grad_log, row // UPDATES, applies, head, heads, channels, K)
    else:
        if DECAY == "none":
            grad_scores = tl.where(below, grad_scores, 0.0)
            grad_coupling = tl.where(below, grad_coupling, 0.0)
        else:
            between = pair_decays(log_decay, first, end, head, heads, K, CHUNK, UPDATES, DECAY)
            grad_scores = tl.where(below, grad_scores * between, 0.0)
            grad_coupling = tl.where(below, grad_coupling * between, 0.0)
            pairs = grad_scores * matmul(queries, tl.trans(keys), DOT, PRECISION)
            if beta is not None:
                pairs += grad_coupling * matmul(keys, tl.trans(keys), DOT, PRECISION)
            pairs = tl.cumsum(pairs * strength[None, :], axis=0, reverse=True) + tl.sum(from_end, axis=1)[None, :]
            from_start = tl.sum(grad_queries * queries + grad_keys * keys, axis=1)
            grad_log = tl.sum(tl.where(below, pairs, 0.0), axis=1)
            grad_log += tl.cumsum(from_start, axis=0, reverse=True) + tl.sum(passing, axis=0)
            target = grad_log_decay + tl.program_id(1).to(tl.int64) * (total_rows // UPDATES) * heads
            applies = inside & (row % UPDATES == 0)
            tl.store(target + (row // UPDATES) * heads + head, grad_log, mask=applies)
        grad_queries += matmul(grad_scores * strength[None, :], keys, DOT, PRECISION)
        grad_write += matmul(tl.trans(grad_scores), queries, DOT, PRECISION)
        if beta is not None:
            grad_keys += matmul(grad_coupling * strength[None, :], keys, DOT, PRECISION)
            grad_write += matmul(tl.trans(grad_coupling), keys, DOT, PRECISION)

    grad_queries += own * strength[:, None] * keys
    grad_write += own * queries
    grad_keys += grad_write * strength[:, None]
    store_tile(grad_q, grad_queries, row // UPDATES, reads, head, heads, channels, K)
    store_tile(grad_k, grad_keys, row, inside, head, heads, channels, K)
    if beta is not None:
        target = grad_beta + tl.program_id(1).to(tl.int64) * total_rows * heads
        tl.store(target + row * heads + head, tl.sum(grad_write * keys, axis=1), mask=inside)


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
    """Gradients of q, k, v (their dtypes), log_decay, beta and the initial state (float32), from :func:`.gpu.forward`.

    ``saved`` and ``saved_updates`` are its last two results with ``save=True``. A constant decay's gradient is summed
    to ``(H,)``; gradients of arguments that were None are None, but that of the initial state is always given.
    """
    layout = Layout.of(q, k, v, log_decay, beta, cu_seqlens, scale, chunk_size)
    with torch.cuda.device_of(q):
        scores, inverse = scores_and_inverse(q, k, log_decay, beta, layout)
        grad_states = torch.empty_like(saved)
        grad_initial_state = torch.empty_like(grad_final_state)
        # With an erase dv is itself an operand, and one that cancels: it is rounded to v's dtype only at the end.
        grad_v = torch.empty_like(v, dtype=v.dtype if beta is None else torch.float32)
        _walk_back(
            q,
            k,
            grad_o,
            log_decay,
            beta,
            scores,
            inverse,
            grad_final_state,
            grad_states,
            grad_v,
            grad_initial_state,
            layout,
        )
        if beta is None:
            _value_gradients(k, grad_o, log_decay, scores, grad_states, grad_v, layout)
        del scores, inverse
        update = v if beta is None else saved_updates
        grad_q, grad_k, grad_log_decay, grad_beta = _local_gradients(
            q, k, grad_o, update, grad_v, log_decay, beta, saved, grad_states, layout
        )
    return grad_q, grad_k, grad_v.to(v.dtype), grad_log_decay, grad_beta, grad_initial_state


def _walk_back(
    q: Tensor,
    k: Tensor,
    grad_o: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scores: Tensor,
    inverse: Tensor | None,
    grad_final_state: Tensor,
    grad_states: Tensor,
    grad_v: Tensor,
    grad_initial_state: Tensor,
    layout: Layout,
) -> None:
    block_k, block_v, warps = state_tiles(layout)
    grid = (
        layout.sequences * layout.heads,
        triton.cdiv(layout.value_width, block_v),
        triton.cdiv(layout.key_width, block_k),
    )
    reverse_kernel[grid](
        q,
        k,
        grad_o,
        log_decay,
        beta,
        scores,
        inverse,
        grad_final_state,
        grad_states,
        grad_v,
        grad_initial_state,
        layout.cu_seqlens,
        layout.rows,
        layout.slots_per_sequence,
        layout.heads,
        layout.scale,
        layout.value_width,
        **layout.variant,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=warps,
        num_stages=1 if layout.erase else 2,
    )


def _value_gradients(
    k: Tensor,
    grad_o: Tensor,
    log_decay: Tensor | None,
    scores: Tensor,
    grad_states: Tensor,
    grad_v: Tensor,
    layout: Layout,
) -> None:
    block_v = layout.tile(layout.value_width, 64)
    value_kernel[(layout.slots * layout.heads, triton.cdiv(layout.value_width, block_v))](
        k,
        grad_o,
        log_decay,
        scores,
        grad_states,
        grad_v,
        layout.slot_bounds,
        layout.rows,
        layout.slots_per_sequence,
        layout.heads,
        layout.value_width,
        **layout.variant,
        BLOCK_K=layout.tile(layout.key_width, 64),
        BLOCK_V=block_v,
        num_warps=4,
        num_stages=2,
    )


def _local_gradients(
    q: Tensor,
    k: Tensor,
    grad_o: Tensor,
    update: Tensor,
    grad_v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    grad_states: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    block_k = layout.tile(layout.key_width, 32 if layout.decay == "vector" else 64)
    key_tiles = triton.cdiv(layout.key_width, block_k)
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    grad_beta = None if beta is None else torch.empty(key_tiles, *beta.shape, dtype=torch.float32, device=q.device)
    grad_log_decay = None
    if layout.decay == "vector":
        grad_log_decay = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    elif layout.decay != "none":
        grad_log_decay = torch.empty(key_tiles, *q.shape[:3], dtype=torch.float32, device=q.device)
    gradient_kernel[(layout.slots * layout.heads, key_tiles)](
        q,
        k,
        grad_o,
        update,
        grad_v,
        log_decay,
        beta,
        states,
        grad_states,
        grad_q,
        grad_k,
        grad_log_decay,
        grad_beta,
        layout.slot_bounds,
        layout.rows,
        k.shape[0] * layout.rows,
        layout.slots_per_sequence,
        layout.heads,
        layout.scale,
        layout.value_width,
        **layout.variant,
        BLOCK_K=block_k,
        BLOCK_V=layout.tile(layout.value_width, 32),
        LEVELS=layout.levels,
        num_warps=4 if layout.chunk < 64 else 8,
        num_stages=2,
    )
    if grad_log_decay is not None and layout.decay != "vector":
        grad_log_decay = grad_log_decay.sum((0, 1, 2) if layout.decay == "constant" else 0)
    return grad_q, grad_k, grad_log_decay, None if grad_beta is None else grad_beta.sum(0)
