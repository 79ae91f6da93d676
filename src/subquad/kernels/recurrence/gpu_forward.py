"""Triton kernels of the recurrence's forward pass and of its single step, and their launches.

Four kernels (Yang et al. 2024, "Gated Linear Attention", section 4; Yang et al. 2024, "DeltaNet", section 3):
``score_kernel`` writes what the tokens of a chunk say to each other, A = tril M(q, w) and L = tril_{-1} M(k, w);
``inverse_kernel`` turns L into (I + L)^-1; ``state_kernel`` walks over the chunks of a sequence and leaves the state
before each; ``output_kernel`` reads states and scores, all chunks at once. The erase is done inside the walk, as
d = (I + L)^-1 (v - (k e^G) S): one small product more per chunk than with precomputed (I + L)^-1 v and
(I + L)^-1 k e^G, but neither of these goes through memory, and v - S^T k is formed before the inverse meets it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.recurrence.gpu_tiles import (
    MAX_KEY_WIDTH,
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
    tile_width,
    widen,
)


@triton.jit(do_not_specialize=["rows", "slots_per_sequence"])
def score_kernel(
    q,
    k,
    log_decay,
    beta,
    scores,
    coupling,
    slot_bounds,
    rows,
    slots_per_sequence,
    heads,
    scale,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    UPDATES: tl.constexpr,
    DECAY: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program per (slot, head): scores (tokens, H, CHUNK), and with an erase the coupling L (rows, H, CHUNK)."""
    head = tl.program_id(0) % heads
    first, end = slot_rows(tl.program_id(0) // heads, slot_bounds, rows, slots_per_sequence, CHUNK)
    if first >= end:
        return
    index = tl.arange(0, CHUNK)
    row = first + index
    inside = row < end
    reads = inside & (row % UPDATES == UPDATES - 1)

    scores_qk = tl.zeros((CHUNK, CHUNK), tl.float32)
    scores_kk = tl.zeros((CHUNK, CHUNK), tl.float32)
    for start in range(0, K, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        queries = load_tile(q, row // UPDATES, reads, head, heads, channels, K)
        keys = load_tile(k, row, inside, head, heads, channels, K)
        if DECAY == "vector":
            log = load_log_decay(log_decay, row, end, head, heads, channels, K, UPDATES, DECAY)
            since_start = tl.exp(log)
            until_end = tl.full((CHUNK, BLOCK_K), 1.0, tl.float32)
            for level in tl.static_range(LEVELS):
                parted = separated(level, CHUNK)
                faded = tl.trans(keys * until_end)
                scores_qk += tl.where(parted, matmul(queries * since_start, faded, DOT, PRECISION), 0.0)
                if beta is not None:
                    scores_kk += tl.where(parted, matmul(keys * since_start, faded, DOT, PRECISION), 0.0)
                since_start, until_end = widen(since_start, until_end, level, CHUNK)
            own = tl.sum(queries.to(tl.float32) * keys, axis=1)
            scores_qk += tl.where(index[:, None] == index[None, :], own[:, None], 0.0)
        else:
            scores_qk += matmul(queries, tl.trans(keys), DOT, PRECISION)
            if beta is not None:
                scores_kk += matmul(keys, tl.trans(keys), DOT, PRECISION)

    weights = load_beta(beta, row, end, head, heads)[None, :]
    if DECAY == "constant" or DECAY == "scalar":
        weights = weights * pair_decays(log_decay, first, end, head, heads, K, CHUNK, UPDATES, DECAY)
    lower = index[:, None] >= index[None, :]
    scores_qk = tl.where(lower, scores_qk * weights * scale, 0.0)
    store_tile(scores, scores_qk, row // UPDATES, reads, head, heads, index, CHUNK)
    if beta is not None:
        scores_kk = tl.where(index[:, None] > index[None, :], scores_kk * weights, 0.0)
        store_tile(coupling, scores_kk, row, inside, head, heads, index, CHUNK)


@triton.jit
def _block(blocks, at: tl.constexpr):
    """Block ``at`` of a (n, 16, 16) tile."""
    index = tl.arange(0, blocks.shape[0])[:, None, None]
    return tl.sum(tl.where(index == at, blocks, 0.0), axis=0)


@triton.jit
def _load_block(matrix, first, end, head, heads, at_row: tl.constexpr, at_column: tl.constexpr, CHUNK: tl.constexpr):
    """The 16x16 block (at_row, at_column) of a chunk's matrix."""
    row = first + at_row * 16 + tl.arange(0, 16)
    return load_tile(matrix, row, row < end, head, heads, at_column * 16 + tl.arange(0, 16), CHUNK)


@triton.jit
def _store_block(
    matrix, tile, first, end, head, heads, at_row: tl.constexpr, at_column: tl.constexpr, CHUNK: tl.constexpr
):
    row = first + at_row * 16 + tl.arange(0, 16)
    store_tile(matrix, tile, row, row < end, head, heads, at_column * 16 + tl.arange(0, 16), CHUNK)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # tf32 costs the inverse three digits


@triton.jit
def _negative_solution(lower, inverse, right):
    """-(I + lower)^-1 right for 16x16 blocks, corrected once by what it leaves over."""
    solution = -_dot(inverse, right)
    return solution - _dot(inverse, right + solution + _dot(lower, solution))


@triton.jit(do_not_specialize=["rows", "slots_per_sequence"])
def inverse_kernel(coupling, inverse, slot_bounds, rows, slots_per_sequence, heads, CHUNK: tl.constexpr):
    """One program per (slot, head): T = (I + L)^-1, float32 throughout; blocks above the diagonal are not written.

    Substitution by rows inside the 16x16 blocks on the diagonal, all of them at once, and by blocks below them:
    (I + L_II) T_IJ = -sum_{J <= M < I} L_IM T_MJ. Powers of L are never formed: with repeated keys they grow like
    binomials. Nor is a block's inverse trusted to solve: with repeated keys and beta = 2 plain products of inverses
    lose another digit, which one correction by the residual brings back.
    """
    head = tl.program_id(0) % heads
    first, end = slot_rows(tl.program_id(0) // heads, slot_bounds, rows, slots_per_sequence, CHUNK)
    if first >= end:
        return
    BLOCKS: tl.constexpr = CHUNK // 16
    block = tl.arange(0, BLOCKS)[:, None, None]
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    row = first + block * 16 + i
    diagonal = tl.load(coupling + (row * heads + head) * CHUNK + block * 16 + j, mask=(row < end) & (i > j), other=0.0)
    inverses = tl.where(i == j, 1.0, tl.zeros((BLOCKS, 16, 16), tl.float32))
    for at in range(1, 16):
        couplings = tl.sum(tl.where(i == at, diagonal, 0.0), axis=1)
        update = tl.sum(couplings[:, :, None] * inverses, axis=1)
        inverses -= tl.where(i == at, update[:, None, :], 0.0)

    t00 = _block(inverses, 0)
    _store_block(inverse, t00, first, end, head, heads, 0, 0, CHUNK)
    if BLOCKS >= 2:
        l10 = _load_block(coupling, first, end, head, heads, 1, 0, CHUNK)
        l11, t11 = _block(diagonal, 1), _block(inverses, 1)
        t10 = _negative_solution(l11, t11, _dot(l10, t00))
        _store_block(inverse, t10, first, end, head, heads, 1, 0, CHUNK)
        _store_block(inverse, t11, first, end, head, heads, 1, 1, CHUNK)
    if BLOCKS == 4:
        l20 = _load_block(coupling, first, end, head, heads, 2, 0, CHUNK)
        l21 = _load_block(coupling, first, end, head, heads, 2, 1, CHUNK)
        l22, t22 = _block(diagonal, 2), _block(inverses, 2)
        t20 = _negative_solution(l22, t22, _dot(l20, t00) + _dot(l21, t10))
        t21 = _negative_solution(l22, t22, _dot(l21, t11))
        _store_block(inverse, t20, first, end, head, heads, 2, 0, CHUNK)
        _store_block(inverse, t21, first, end, head, heads, 2, 1, CHUNK)
        _store_block(inverse, t22, first, end, head, heads, 2, 2, CHUNK)
        l30 = _load_block(coupling, first, end, head, heads, 3, 0, CHUNK)
        l31 = _load_block(coupling, first, end, head, heads, 3, 1, CHUNK)
        l32 = _load_block(coupling, first, end, head, heads, 3, 2, CHUNK)
        l33, t33 = _block(diagonal, 3), _block(inverses, 3)
        t30 = _negative_solution(l33, t33, _dot(l30, t00) + _dot(l31, t10) + _dot(l32, t20))
        t31 = _negative_solution(l33, t33, _dot(l31, t11) + _dot(l32, t21))
        t32 = _negative_solution(l33, t33, _dot(l32, t22))
        _store_block(inverse, t30, first, end, head, heads, 3, 0, CHUNK)
        _store_block(inverse, t31, first, end, head, heads, 3, 1, CHUNK)
        _store_block(inverse, t32, first, end, head, heads, 3, 2, CHUNK)
        _store_block(inverse, t33, first, end, head, heads, 3, 3, CHUNK)


@triton.jit(do_not_specialize=["rows", "slots_per_sequence"])
def state_kernel(
    k,
    v,
    log_decay,
    beta,
    inverse,
    initial_state,
    states,
    updates,
    final_state,
    cu_seqlens,
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
    """One program per (sequence, head), V tile and K tile (one K tile if there is an erase, which reads all of K).

    Writes the state before each chunk, the final state, and with an erase the updates d (rows, H, V).
    """
    sequence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    channels = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = (channels < K)[:, None] & (values < V)[None, :]
    begin, end, slot, slot_end = sequence_rows(sequence, cu_seqlens, rows, slots_per_sequence, CHUNK, UPDATES)

    if initial_state is None:
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    else:
        source = state_pointers(initial_state, sequence, head, heads, channels, values, K, V)
        state = tl.load(source, mask=tile, other=0.0)
    for first in range(begin, end, CHUNK):
        tl.store(state_pointers(states, slot, head, heads, channels, values, K, V), state, mask=tile)
        row = first + tl.arange(0, CHUNK)
        inside = row < end
        keys = load_tile(k, row, inside, head, heads, channels, K)
        update = load_tile(v, row, inside, head, heads, values, V)
        since_start, until_end, over_all = chunk_decays(
            log_decay, first, end, head, heads, channels, K, CHUNK, UPDATES, DECAY
        )
        if beta is not None:
            error = update - matmul(keys * since_start, state, DOT, PRECISION)
            solve = load_lower(inverse, row, inside, head, heads, CHUNK)
            update = tl.dot(solve, error, input_precision="tf32x3")
            store_tile(updates, update, row, inside, head, heads, values, V)
        write = keys * until_end * load_beta(beta, row, end, head, heads)[:, None]
        state = state * over_all[:, None] + matmul(tl.trans(write), update, DOT, PRECISION)
        slot += 1
    tl.store(state_pointers(final_state, sequence, head, heads, channels, values, K, V), state, mask=tile)
    if slot < slot_end:  # the spare slot of a sequence whose boundaries fall well; nobody reads it, but it is defined
        tl.store(state_pointers(states, slot, head, heads, channels, values, K, V), state, mask=tile)


@triton.jit(do_not_specialize=["rows", "slots_per_sequence"])
def output_kernel(
    q,
    update,
    log_decay,
    scores,
    states,
    o,
    slot_bounds,
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
    """One program per (slot, head) and V tile: o = scale (q e^G) S + A d."""
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    first, end = slot_rows(slot, slot_bounds, rows, slots_per_sequence, CHUNK)
    if first >= end:
        return
    row = first + tl.arange(0, CHUNK)
    inside = row < end
    reads = inside & (row % UPDATES == UPDATES - 1)
    output = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    for start in range(0, K, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        queries = load_tile(q, row // UPDATES, reads, head, heads, channels, K)
        since_start, _, _ = chunk_decays(log_decay, first, end, head, heads, channels, K, CHUNK, UPDATES, DECAY)
        source = state_pointers(states, slot, head, heads, channels, values, K, V)
        state = tl.load(source, mask=(channels < K)[:, None] & (values < V)[None, :], other=0.0)
        output += matmul(queries * since_start, state, DOT, PRECISION)
    within = load_lower(scores, row // UPDATES, reads, head, heads, CHUNK)
    written = load_tile(update, row, inside, head, heads, values, V)
    output = output * scale + matmul(within, written, DOT, PRECISION)
    store_tile(o, output, row // UPDATES, reads, head, heads, values, V)


@triton.jit
def step_kernel(
    q,
    k,
    v,
    log_decay,
    beta,
    state,
    o,
    new_state,
    heads,
    scale,
    V,
    K: tl.constexpr,
    UPDATES: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per (batch row, head) and V tile: the recurrence as it is written, on one state tile."""
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    channels = tl.arange(0, BLOCK_K)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = (channels < K)[:, None] & (values < V)[None, :]
    memory = tl.load(state_pointers(state, batch, head, heads, channels, values, K, V), mask=tile, other=0.0)
    first = (batch * UPDATES).to(tl.int64) + tl.arange(0, 1)
    log = load_log_decay(log_decay, first, first + 1, head, heads, channels, K, UPDATES, DECAY)
    memory *= tl.trans(tl.exp(log))
    for update in tl.static_range(UPDATES):
        row = (batch * UPDATES + update).to(tl.int64) * heads + head
        key = tl.load(k + row * K + channels, mask=channels < K, other=0.0).to(tl.float32)
        value = tl.load(v + row * V + values, mask=values < V, other=0.0).to(tl.float32)
        if beta is not None:
            value = tl.load(beta + row) * (value - tl.sum(memory * key[:, None], axis=0))
        memory += key[:, None] * value[None, :]
    query = tl.load(q + tl.program_id(0).to(tl.int64) * K + channels, mask=channels < K, other=0.0).to(tl.float32)
    output = scale * tl.sum(memory * query[:, None], axis=0)
    target = o + tl.program_id(0).to(tl.int64) * V + values
    tl.store(target, output.to(o.dtype.element_ty), mask=values < V)
    tl.store(state_pointers(new_state, batch, head, heads, channels, values, K, V), memory, mask=tile)


def scores_and_inverse(
    q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor | None]:
    """A ``(B, T, H, chunk)`` float32, and with an erase (I + L)^-1 ``(B, T n, H, chunk)``, lower triangle only."""
    grid = (layout.slots * layout.heads,)
    scores = torch.empty(*q.shape[:3], layout.chunk, dtype=torch.float32, device=q.device)
    coupling = None if beta is None else torch.empty(*beta.shape, layout.chunk, dtype=torch.float32, device=q.device)
    score_kernel[grid](
        q,
        k,
        log_decay,
        beta,
        scores,
        coupling,
        layout.slot_bounds,
        layout.rows,
        layout.slots_per_sequence,
        layout.heads,
        layout.scale,
        **layout.variant,
        BLOCK_K=layout.tile(layout.key_width, 32 if layout.decay == "vector" else 64),
        LEVELS=layout.levels,
        num_warps=4 if layout.chunk < 64 else 8,
    )
    if coupling is None:
        return scores, None
    inverse = torch.empty_like(coupling)
    inverse_kernel[grid](
        coupling,
        inverse,
        layout.slot_bounds,
        layout.rows,
        layout.slots_per_sequence,
        layout.heads,
        CHUNK=layout.chunk,
        num_warps=2,
    )
    return scores, inverse


def chunk_states(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    inverse: Tensor | None,
    initial_state: Tensor | None,
    layout: Layout,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """States before each chunk ``(slots, H, K, V)``, updates d ``(B, T n, H, V)`` with an erase, final states."""
    shape = (layout.heads, layout.key_width, layout.value_width)
    states = torch.empty(layout.slots, *shape, dtype=torch.float32, device=k.device)
    final_state = torch.empty(layout.sequences, *shape, dtype=torch.float32, device=k.device)
    updates = None if beta is None else torch.empty(v.shape, dtype=torch.float32, device=k.device)
    block_k, block_v, warps = state_tiles(layout)
    grid = (
        layout.sequences * layout.heads,
        triton.cdiv(layout.value_width, block_v),
        triton.cdiv(layout.key_width, block_k),
    )
    state_kernel[grid](
        k,
        v,
        log_decay,
        beta,
        inverse,
        initial_state,
        states,
        updates,
        final_state,
        layout.cu_seqlens,
        layout.rows,
        layout.slots_per_sequence,
        layout.heads,
        layout.value_width,
        **layout.variant,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=warps,
        num_stages=1 if layout.erase else 2,
    )
    return states, updates, final_state


def state_tiles(layout: Layout) -> tuple[int, int, int]:
    """K tile, V tile and warps of the walks over chunks."""
    if not layout.erase:
        return layout.tile(layout.key_width, 64), layout.tile(layout.value_width, 64), 4
    block_k = tile_width(layout.key_width, MAX_KEY_WIDTH)
    block_v = layout.tile(layout.value_width, 64 if block_k <= 64 else 32)
    return block_k, block_v, 4 if block_k <= 64 else 8


def chunk_outputs(
    q: Tensor,
    update: Tensor,
    log_decay: Tensor | None,
    scores: Tensor,
    states: Tensor,
    dtype: torch.dtype,
    layout: Layout,
) -> Tensor:
    """``o (B, T, H, V)`` in ``dtype`` from the states before each chunk and what was written inside it."""
    o = torch.empty(*q.shape[:3], layout.value_width, dtype=dtype, device=q.device)
    block_v = layout.tile(layout.value_width, 64)
    output_kernel[(layout.slots * layout.heads, triton.cdiv(layout.value_width, block_v))](
        q,
        update,
        log_decay,
        scores,
        states,
        o,
        layout.slot_bounds,
        layout.rows,
        layout.slots_per_sequence,
        layout.heads,
        layout.scale,
        layout.value_width,
        **layout.variant,
        BLOCK_K=layout.tile(layout.key_width, 64),
        BLOCK_V=block_v,
        num_warps=4,
        num_stages=2,
    )
    return o
