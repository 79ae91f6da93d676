"""The gates of causal flow attention on a CPU: one loop over the tokens of a head, whose sums stay in cache.

Names are those of the definition in ``subquad.ops.flow.reference``. The backward pass recomputes the sums a segment at
a time, from sums kept between segments, and runs through each segment in reverse: the gradient of a sum up to a token
is the sum from that token on. One work item is one head of one sequence.
"""

import numpy as np
from numba import njit
from torch import Tensor

from subquad.kernels import pool
from subquad.kernels.numba_math import FASTMATH, exp32
from subquad.kernels.recurrence.cpu_chunks import CHUNK_ROWS, describe, float32_array, refuse, uninitialised

#: Tokens whose sums exist at once in the backward pass: four vectors and five numbers each.
SEGMENT = 128

_ZERO, _ONE = np.float32(0), np.float32(1)


class _Arguments:
    """The tensors as float32 arrays ``(tokens, heads, .)``, their shapes checked."""

    def __init__(
        self, q: Tensor, k: Tensor, keep: Tensor | None, sums: Tensor, competition: Tensor, count: Tensor,
        cu_seqlens: Tensor | None,
    ) -> None:  # fmt: skip
        form = describe(q, k, k, cu_seqlens, CHUNK_ROWS)
        self.sequences, self.heads, self.tokens, self.width = form.sequences, form.heads, form.tokens, form.key_width
        shape = (form.sequences, form.heads, 4, form.key_width)
        if sums.shape != shape or competition.shape != shape[:2] or count.shape != shape[:1]:
            refuse(
                "sums, competition, count",
                f"of shapes {tuple(sums.shape)}, {tuple(competition.shape)}, {tuple(count.shape)}",
                f"{shape}, {shape[:2]}, {shape[:1]} are needed",
            )
        if keep is not None and keep.shape != q.shape[:2]:
            refuse("keep", f"of shape {tuple(keep.shape)}", f"{tuple(q.shape[:2])} is needed")
        self.arrays = (
            float32_array(q).reshape(form.tokens, form.heads, -1),
            float32_array(k).reshape(form.tokens, form.heads, -1),
            np.ones(form.tokens, np.bool_) if keep is None else keep.contiguous().numpy().reshape(form.tokens),
            float32_array(sums),
            float32_array(competition),
            float32_array(count),
            form.starts,
        )


def forward(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    sums: Tensor,
    competition: Tensor,
    count: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    clip: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocation and competition ``(B, T, H)``, sums and competition after the last token: :func:`.gates.causal_gates`.

    ``cu_seqlens (N + 1,)`` packs sequences in a batch of one; sums are then ``(N, H, 4, K)``.
    """
    given = _Arguments(q, k, keep, sums, competition, count, cu_seqlens)
    allocation, compete = uninitialised(*q.shape[:3]), uninitialised(*q.shape[:3])
    last, total = uninitialised(*sums.shape), uninitialised(*competition.shape)

    def work(first: int, end: int) -> None:
        _forward_items(
            first,
            end,
            *given.arrays,
            allocation.numpy().reshape(given.tokens, given.heads),
            compete.numpy().reshape(given.tokens, given.heads),
            last.numpy(),
            total.numpy(),
            np.float32(eps),
            np.float32(clip),
            np.float32(1 / temperature),
        )

    pool.run_over_items(work, given.sequences * given.heads)
    return allocation, compete, last, total


@njit(fastmath=FASTMATH)
def _advance(query, key, width, number, eps, clip, sharpness, sums, scalars):
    """Take a token into ``sums``; ``scalars`` become I, O, the conserved flows, and the exponential."""
    incoming, outgoing = _ZERO, _ZERO
    for d in range(width):
        sums[0, d] += key[d]
    for d in range(width):
        sums[1, d] += query[d]
    for d in range(width):
        incoming += (query[d] + eps) * (sums[0, d] + eps)
    for d in range(width):
        outgoing += (key[d] + eps) * (sums[1, d] + eps)
    from_key, from_query = number / outgoing, number / incoming
    for d in range(width):
        sums[2, d] += key[d] * from_key
    for d in range(width):
        sums[3, d] += query[d] * from_query
    conserved_incoming, conserved_outgoing = _ZERO, _ZERO
    for d in range(width):
        conserved_incoming += (query[d] + eps) * (sums[2, d] + eps)
    for d in range(width):
        conserved_outgoing += (key[d] + eps) * (sums[3, d] + eps)
    scalars[0] = incoming
    scalars[1] = outgoing
    scalars[2] = conserved_incoming / number
    scalars[3] = conserved_outgoing / number
    scalars[4] = exp32(min(max(scalars[3] * sharpness, -clip), clip))


@njit(fastmath=FASTMATH)
def _sigmoid(x):
    return _ONE / (_ONE + exp32(-x))


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward_items(
    first_item,
    last_item,
    q,
    k,
    keep,
    initial,
    initial_competition,
    count,
    starts,
    allocation,
    compete,
    final,
    final_competition,
    eps,
    clip,
    sharpness,
):
    heads, width = q.shape[1], q.shape[2]
    sums = np.empty((4, width), np.float32)
    scalars = np.empty(5, np.float32)
    for item in range(first_item, last_item):
        head, sequence = item % heads, item // heads
        sums[:] = initial[sequence, head]
        total, number = initial_competition[sequence, head], count[sequence]
        for token in range(starts[sequence], starts[sequence + 1]):
            if not keep[token]:
                allocation[token, head] = _ZERO
                compete[token, head] = _ZERO
                continue
            number += _ONE
            _advance(q[token, head], k[token, head], width, number, eps, clip, sharpness, sums, scalars)
            total += scalars[4]
            allocation[token, head] = _sigmoid(scalars[2]) / scalars[0]
            compete[token, head] = number * scalars[4] / total
        final[sequence, head] = sums
        final_competition[sequence, head] = total


def backward(
    grad_allocation: Tensor,
    grad_compete: Tensor,
    grad_last: Tensor,
    grad_total: Tensor,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    sums: Tensor,
    competition: Tensor,
    count: Tensor,
    cu_seqlens: Tensor | None,
    eps: float,
    clip: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and k in their dtypes, of the sums and of the competition before the first token."""
    given = _Arguments(q, k, keep, sums, competition, count, cu_seqlens)
    grad_q, grad_k = (uninitialised(given.tokens, given.heads, given.width) for _ in range(2))
    grad_sums, grad_competition = uninitialised(*sums.shape), uninitialised(*competition.shape)

    def work(first: int, end: int) -> None:
        _backward_items(
            first,
            end,
            *given.arrays,
            float32_array(grad_allocation).reshape(given.tokens, given.heads),
            float32_array(grad_compete).reshape(given.tokens, given.heads),
            float32_array(grad_last),
            float32_array(grad_total),
            grad_q.numpy(),
            grad_k.numpy(),
            grad_sums.numpy(),
            grad_competition.numpy(),
            np.float32(eps),
            np.float32(clip),
            np.float32(1 / temperature),
        )

    pool.run_over_items(work, given.sequences * given.heads)
    return (
        grad_q.reshape(q.shape).to(q.dtype),
        grad_k.reshape(k.shape).to(k.dtype),
        grad_sums.to(sums.dtype),
        grad_competition.to(competition.dtype),
    )


@njit(nogil=True, cache=True, fastmath=FASTMATH, error_model="numpy")
def _backward_items(
    first_item,
    last_item,
    q,
    k,
    keep,
    initial,
    initial_competition,
    count,
    starts,
    grad_allocation,
    grad_compete,
    grad_final,
    grad_final_competition,
    grad_q,
    grad_k,
    grad_initial,
    grad_initial_competition,
    eps,
    clip,
    sharpness,
):
    heads, width = q.shape[1], q.shape[2]
    longest = np.int64(0)
    for sequence in range(len(starts) - 1):
        longest = max(longest, starts[sequence + 1] - starts[sequence])
    borders = np.empty((longest // SEGMENT + 1, 4, width), np.float32)
    border_scalars = np.empty((longest // SEGMENT + 1, 2), np.float32)  # competition and number
    seen = np.empty((SEGMENT, 4, width), np.float32)
    scalars = np.empty((SEGMENT, 7), np.float32)  # of _advance, then competition and number
    sums = np.empty((4, width), np.float32)
    suffix = np.empty((4, width), np.float32)

    for item in range(first_item, last_item):
        head, sequence = item % heads, item // heads
        begin, end = starts[sequence], starts[sequence + 1]
        sums[:] = initial[sequence, head]
        total, number = initial_competition[sequence, head], count[sequence]
        for token in range(begin, end):
            if (token - begin) % SEGMENT == 0:
                place = (token - begin) // SEGMENT
                borders[place] = sums
                border_scalars[place, 0] = total
                border_scalars[place, 1] = number
            if keep[token]:
                number += _ONE
                _advance(q[token, head], k[token, head], width, number, eps, clip, sharpness, sums, scalars[0])
                total += scalars[0, 4]

        suffix[:] = grad_final[sequence, head]
        suffix_total = grad_final_competition[sequence, head]
        for place in range((end - begin + SEGMENT - 1) // SEGMENT - 1, -1, -1):
            start = begin + place * SEGMENT
            length = min(SEGMENT, end - start)
            sums[:] = borders[place]
            total, number = border_scalars[place, 0], border_scalars[place, 1]
            for i in range(length):
                if keep[start + i]:
                    number += _ONE
                    _advance(
                        q[start + i, head], k[start + i, head], width, number, eps, clip, sharpness, sums, scalars[i]
                    )
                    total += scalars[i, 4]
                    seen[i] = sums
                    scalars[i, 5] = total
                    scalars[i, 6] = number
            for i in range(length - 1, -1, -1):
                token = start + i
                to_query, to_key = grad_q[token, head], grad_k[token, head]
                if not keep[token]:
                    to_query[:] = _ZERO
                    to_key[:] = _ZERO
                    continue
                suffix_total = _token_gradient(
                    q[token, head],
                    k[token, head],
                    width,
                    seen[i],
                    scalars[i],
                    grad_allocation[token, head],
                    grad_compete[token, head],
                    suffix,
                    suffix_total,
                    to_query,
                    to_key,
                    eps,
                    clip,
                    sharpness,
                )
        grad_initial[sequence, head] = suffix
        grad_initial_competition[sequence, head] = suffix_total


@njit(fastmath=FASTMATH)
def _token_gradient(
    query,
    key,
    width,
    sums,
    scalars,
    grad_allocation,
    grad_compete,
    suffix,
    suffix_total,
    to_query,
    to_key,
    eps,
    clip,
    sharpness,
):
    """Gradients of one token's query and key; ``suffix`` grows by what the sums up to it got; the last is returned."""
    incoming, outgoing, exponential = scalars[0], scalars[1], scalars[4]
    total, number = scalars[5], scalars[6]
    share = _sigmoid(scalars[2])
    on_conserved_incoming = grad_allocation / incoming * share * (_ONE - share) / number
    on_incoming = -grad_allocation * share / (incoming * incoming)
    suffix_total -= grad_compete * number * exponential / (total * total)
    on_exponential = grad_compete * number / total + suffix_total
    scaled = scalars[3] * sharpness
    inside = _ONE if -clip <= scaled and scaled <= clip else _ZERO
    on_conserved_outgoing = inside * on_exponential * exponential * sharpness / number

    for d in range(width):
        suffix[2, d] += on_conserved_incoming * (query[d] + eps)
    for d in range(width):
        suffix[3, d] += on_conserved_outgoing * (key[d] + eps)
    on_query_flow, on_key_flow = _ZERO, _ZERO
    for d in range(width):
        on_query_flow += suffix[3, d] * query[d]
    for d in range(width):
        on_key_flow += suffix[2, d] * key[d]
    on_incoming -= on_query_flow * number / (incoming * incoming)
    on_outgoing = -on_key_flow * number / (outgoing * outgoing)
    for d in range(width):
        suffix[0, d] += on_incoming * (query[d] + eps)
    for d in range(width):
        suffix[1, d] += on_outgoing * (key[d] + eps)
    from_query, from_key = number / incoming, number / outgoing
    for d in range(width):
        to_query[d] = on_conserved_incoming * (sums[2, d] + eps) + suffix[3, d] * from_query
    for d in range(width):
        to_query[d] += on_incoming * (sums[0, d] + eps) + suffix[1, d]
    for d in range(width):
        to_key[d] = on_conserved_outgoing * (sums[3, d] + eps) + suffix[2, d] * from_key
    for d in range(width):
        to_key[d] += on_outgoing * (sums[1, d] + eps) + suffix[0, d]
    return suffix_total
