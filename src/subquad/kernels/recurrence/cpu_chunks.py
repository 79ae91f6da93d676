"""How the CPU kernels see a recurrence and cut it into chunks; shared by the forward and the backward pass.

Everything is packed: a batch is a packed run whose sequences happen to be equally long. A chunk is a run of tokens of
one sequence inside which products of scaled rows stay within float32. With G the log decay summed inside the chunk,
from its second token on, and m = G_last / 2, every kind of decay becomes a plain product of rows scaled by e^(G - m)::

    read rows (k E, scale q E)    write rows (beta k / E)    scores = lower triangle of read write^T
    incoming state e^(g_first + m) S    outgoing state e^m (incoming + write^T D)

where E = e^(G - m). The first token's own decay meets only the incoming state: a hard reset costs one chunk boundary.
A chunk ends before |G| passes ``MAX_RANGE`` in any channel: the chunk form of Yang et al. 2024 ("Gated Linear
Attention", section 4) with shorter chunks in place of a second level of tiles. States are kept every ``GROUP_CHUNKS``
full chunks and recomputed in between by the backward pass.
"""

from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numba import njit
from torch import Tensor

from subquad.kernels.numba_math import FASTMATH, PADDING, TILE_ROWS, exp32, multiply, whole
from subquad.kernels.recurrence.checks import check_offsets

#: Rows of updates in a full chunk. 16 to 64 cost about the same; 32 was the best on every machine measured.
CHUNK_ROWS = 32
#: A saved state per this many full chunks: an eighth of the memory of one per chunk, at the same kernel time.
GROUP_CHUNKS = 8
#: Largest range of the summed log decay in a chunk. Products stay inside float32 up to 60; at 40 the factor of the
#: incoming state, e^(g + m) with g and 2 m both at the limit, is above float32's smallest too, so that the tiny
#: gradients of strong decays keep their digits.
MAX_RANGE = np.float32(40)
#: Log decays below this are taken as this: e^-100 is a hard reset and 0 in float32 (-inf would give inf - inf).
MIN_LOG_DECAY = np.float32(-100)

#: Narrowest slice of value columns worth a work item of its own: each repeats the scores.
MIN_SLICE = 32

NO_DECAY, CONSTANT, SCALAR, VECTOR = range(4)


class Layout(NamedTuple):
    """Sizes and places that follow from the arguments' shapes and ``cu_seqlens`` alone."""

    sequences: int
    tokens: int  # of all sequences together
    heads: int
    key_width: int
    value_width: int
    updates: int  # per token
    chunk_tokens: int  # in a full chunk
    group_tokens: int  # between saved states
    starts: np.ndarray  # (sequences + 1,) first token of each sequence
    group_starts: np.ndarray  # (sequences + 1,) first saved state of each sequence


class Inputs(NamedTuple):
    """Float32 views for the kernels: ``(tokens, heads, width)``, gates ``(tokens, heads, 1 or K)``."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    log_decay: np.ndarray
    beta: np.ndarray
    initial_state: np.ndarray
    decay_kind: int


def group_tokens(updates: int) -> int:
    return GROUP_CHUNKS * max(1, CHUNK_ROWS // updates)


def saved_states(batch: int, time: int, updates: int) -> int:
    """Number of saved states: one before each group but the first of a sequence.

    Known from shapes alone: for packed sequences (batch 1) it is an upper bound, and what is not used is zero.
    """
    return batch * ((time - 1) // group_tokens(updates))


def value_slices(form: Layout) -> int:
    """Pieces into which the value columns of a head are cut so that every thread has work; they are independent."""
    items = form.sequences * form.heads
    return max(1, min(torch.get_num_threads() // items, form.value_width // MIN_SLICE))


def float32_array(tensor: Tensor) -> np.ndarray:
    """A contiguous float32 array that shares the tensor's memory where it can."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != torch.float32:
        tensor = tensor.to(torch.float32)
    return tensor.contiguous().numpy()


def uninitialised(*shape: int) -> Tensor:
    """A float32 tensor in memory that numpy asks for: large arrays come in huge pages, which torch's do not.

    Touching fresh small pages costs a fifth of a long forward pass: 85 ms against 18 for 134 MB.
    """
    return torch.from_numpy(np.empty(shape, np.float32))


def empty(dimensions: int) -> np.ndarray:
    """What the kernels get for an argument that is absent: they test its length."""
    return np.empty((0,) * dimensions, np.float32)


def refuse(name: str, came: object, needed: str) -> NoReturn:
    """Raise a ValueError that states what came and what is needed."""
    raise ValueError(f"{name} is {came}, but {needed}")


def describe(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Layout:
    """Check the shapes that the kernels index by (they have no bounds checks) and describe them."""
    if q.dim() != 4 or 0 in q.shape:
        refuse(
            "q", f"of shape {tuple(q.shape)}", "(batch, time, heads, key width) without an empty dimension is needed"
        )
    batch, time, heads, key_width = q.shape
    updates = k.shape[1] // time if k.dim() == 4 else 0
    if updates < 1 or k.shape != (batch, time * updates, heads, key_width):
        refuse(
            "k", f"of shape {tuple(k.shape)}", f"({batch}, {time} x updates, {heads}, {key_width}) is needed for this q"
        )
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        refuse("v", f"of shape {tuple(v.shape)}", f"{tuple(k.shape[:3])} and a value width of at least 1 are needed")
    if chunk_size < 1:
        refuse("chunk_size", chunk_size, "at least 1 is needed")
    starts = _sequence_starts(batch, time, cu_seqlens)
    group = group_tokens(updates)
    lengths = np.diff(starts)
    saved = np.maximum(lengths - 1, 0) // group
    return Layout(
        sequences=len(lengths),
        tokens=batch * time,
        heads=heads,
        key_width=key_width,
        value_width=v.shape[3],
        updates=updates,
        chunk_tokens=max(1, min(chunk_size, CHUNK_ROWS) // updates),
        group_tokens=group,
        starts=starts,
        group_starts=np.concatenate([[0], np.cumsum(saved)]),
    )


def _sequence_starts(batch: int, time: int, cu_seqlens: Tensor | None) -> np.ndarray:
    if cu_seqlens is None:
        return np.arange(batch + 1, dtype=np.int64) * time
    if batch != 1:
        refuse("the batch", batch, "packed sequences (cu_seqlens) need a batch of 1")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        refuse(
            "cu_seqlens",
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}",
            "whole numbers (int32 or int64) of shape (sequences + 1,) are needed",
        )
    return np.array(check_offsets(cu_seqlens, time), dtype=np.int64)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    form: Layout,
) -> Inputs:
    """Check the gates' shapes and the state's, and cast everything to the one signature of the kernels."""
    batch, time, heads, key_width = q.shape
    kinds = {(heads,): CONSTANT, (batch, time, heads): SCALAR, (batch, time, heads, key_width): VECTOR}
    if log_decay is None:
        kind, gates = NO_DECAY, (0, 0, 0)
    else:
        kind = kinds.get(tuple(log_decay.shape), NO_DECAY)
        if kind == NO_DECAY:
            refuse("log_decay", f"of shape {tuple(log_decay.shape)}", f"one of {', '.join(map(str, kinds))} is needed")
        gates = (1 if kind == CONSTANT else form.tokens, heads, key_width if kind == VECTOR else 1)
    if beta is None and form.updates > 1:
        refuse("beta", None, f"{form.updates} updates per token need it")
    if beta is not None and beta.shape != k.shape[:3]:
        refuse("beta", f"of shape {tuple(beta.shape)}", f"{tuple(k.shape[:3])} is needed for this k")
    state_shape = (form.sequences, heads, key_width, form.value_width)
    if initial_state is not None and initial_state.shape != state_shape:
        refuse("initial_state", f"of shape {tuple(initial_state.shape)}", f"{state_shape} is needed")
    rows = form.tokens * form.updates
    return Inputs(
        q=float32_array(q).reshape(form.tokens, heads, key_width),
        k=float32_array(k).reshape(rows, heads, key_width),
        v=float32_array(v).reshape(rows, heads, form.value_width),
        log_decay=empty(3) if log_decay is None else float32_array(log_decay).reshape(gates),
        beta=empty(2) if beta is None else float32_array(beta).reshape(rows, heads),
        initial_state=empty(4) if initial_state is None else float32_array(initial_state),
        decay_kind=kind,
    )


# --- inside the kernels ---------------------------------------------------------------------------------------------


@njit(fastmath=FASTMATH)
def begin_chunk(log_decay, kind, head, token, limit, width, sums, scales, incoming, outgoing):
    """Choose the length of the chunk that starts at ``token`` (at most ``limit`` tokens) and its scales.

    ``sums`` and ``scales`` are (tokens, K) for a vector decay, of which column 0 is used for a scalar one. Afterwards
    ``scales`` holds E, and ``incoming``, ``outgoing`` (K,) the factors of the state on either side.
    """
    if kind == NO_DECAY:
        return limit
    first = np.int64(0) if kind == CONSTANT else token
    columns = width if kind == VECTOR else np.int64(1)
    for d in range(columns):
        sums[0, d] = np.float32(0)
    length = limit
    for i in range(1, limit):
        if kind == CONSTANT:  # one rounding, not i: an error that repeats in every chunk would add up
            sums[i, 0] = np.float32(i) * max_with_nan(log_decay[0, head, 0], MIN_LOG_DECAY)
        else:
            for d in range(columns):
                sums[i, d] = sums[i - 1, d] + max_with_nan(log_decay[token + i, head, d], MIN_LOG_DECAY)
        if i % 8 == 7 or i == limit - 1:  # sums only fall: look back only after a block that left the range
            length = i + 1
            while length > 1 and leaves_range(sums, length - 1, columns):
                length -= 1
            if length <= i:
                break
    for d in range(columns):
        half = np.float32(0.5) * sums[length - 1, d]
        outgoing[d] = half
        incoming[d] = half + max_with_nan(log_decay[first, head, d], MIN_LOG_DECAY)
    for i in range(length):
        for d in range(columns):
            scales[i, d] = exp32(sums[i, d] - outgoing[d])
    for d in range(columns):
        incoming[d] = exp32(incoming[d])
    for d in range(columns):
        outgoing[d] = exp32(outgoing[d])
    if columns < width:
        for d in range(1, width):
            incoming[d] = incoming[0]
            outgoing[d] = outgoing[0]
    return length


@njit(fastmath=FASTMATH)
def max_with_nan(x, low):
    return low if x < low else x


@njit(fastmath=FASTMATH)
def leaves_range(sums, row, columns):
    outside = 0
    for d in range(columns):
        outside += sums[row, d] < -MAX_RANGE
    return outside > 0


@njit(fastmath=FASTMATH)
def load_rows(source, first, count, head, begin, width, target):
    """Copy ``count`` rows of one head, columns from ``begin``, to a tile: rows of the source collide in cache."""
    for i in range(count):
        row = source[first + i, head, begin:]
        for d in range(width):
            target[i, d] = row[d]


@njit(fastmath=FASTMATH)
def store_rows(source, count, width, target, first, head, begin):
    """The way back of ``load_rows``."""
    for i in range(count):
        row = target[first + i, head, begin:]
        for d in range(width):
            row[d] = source[i, d]


@njit(fastmath=FASTMATH)
def load_state(states, place, head, begin, width, columns, target):
    for a in range(width):
        row = states[place, head, a, begin:]
        for c in range(columns):
            target[a, c] = row[c]


@njit(fastmath=FASTMATH)
def store_state(source, width, columns, states, place, head, begin):
    for a in range(width):
        row = states[place, head, a, begin:]
        for c in range(columns):
            row[c] = source[a, c]


@njit(fastmath=FASTMATH)
def load_read_rows(source, first, count, head, width, factor, kind, scales, per_token, target):
    """``target = factor source E``: what meets the state and the write rows. E's row is that of the row's token."""
    for i in range(count):
        if kind == VECTOR:
            token = i // per_token
            for d in range(width):
                target[i, d] = source[first + i, head, d] * factor * scales[token, d]
        else:
            weight = factor if kind == NO_DECAY else factor * scales[i // per_token, 0]
            for d in range(width):
                target[i, d] = source[first + i, head, d] * weight


@njit(fastmath=FASTMATH)
def load_write_rows(k, beta, erase, first, count, head, width, kind, scales, per_token, target):
    """``target = beta k / E`` (beta 1 without erase): what is written to the state."""
    for i in range(count):
        weight = beta[first + i, head] if erase else np.float32(1)
        if kind == VECTOR:
            token = i // per_token
            for d in range(width):
                target[i, d] = weight * k[first + i, head, d] / scales[token, d]
        else:
            if kind != NO_DECAY:
                weight /= scales[i // per_token, 0]
            for d in range(width):
                target[i, d] = k[first + i, head, d] * weight


@njit(fastmath=FASTMATH)
def scale_state(state, factors, rows, columns):
    for a in range(rows):
        factor = factors[a]
        for c in range(columns):
            state[a, c] *= factor


# Scores are lower triangles: of rows ``first`` to ``first + count`` row i has entries for (i + 1) * per_row updates at
# most (per_row is 1 for erase rows, the updates per token for read rows). Blocks of rows leave out most of the rest.


@njit(fastmath=FASTMATH)
def lower_product(first, count, per_row, rows, width, a, b, scores):
    """``scores = a b`` with a (.., width) and b (width, rows) where there are entries."""
    for i in range(0, count, PADDING):
        height = min(PADDING, count - i)
        reach = whole(min((i + height) * per_row, rows))
        multiply(False, height, reach, width, np.float32(1), a[first + i :], b, False, scores[first + i :])


@njit(fastmath=FASTMATH)
def apply_lower(first, count, per_row, rows, columns, scores, values, target):
    """``target += scores values``, row by row."""
    for i in range(0, count, TILE_ROWS):
        height = min(TILE_ROWS, count - i)
        reach = min((i + height) * per_row, rows)
        multiply(False, height, columns, reach, np.float32(1), scores[first + i :], values, True, target[first + i :])


@njit(fastmath=FASTMATH)
def apply_lower_transposed(first, count, per_row, rows, columns, scores, values, target):
    """``target += scores^T values``, where target has a row per update."""
    for i in range(0, count, 2 * TILE_ROWS):
        height = min(2 * TILE_ROWS, count - i)
        reach = min((i + height) * per_row, rows)
        multiply(True, reach, columns, height, np.float32(1), scores[first + i :], values[first + i :], True, target)


@njit(fastmath=FASTMATH)
def mask_scores(scores, erase_rows, tokens, rows, per_token):
    """Zero what lies in the future, by assignment: there the products may be infinite.

    Erase row i sees updates before i; the read of token i sees the updates of tokens up to i.
    """
    for i in range(erase_rows):
        for j in range(i, rows):
            scores[i, j] = np.float32(0)
    for i in range(tokens):
        for j in range((i + 1) * per_token, rows):
            scores[erase_rows + i, j] = np.float32(0)
