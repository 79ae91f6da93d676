"""Means over prefixes on a GPU by Triton: one program per sequence and head, walking over chunks of tokens.

Inside a chunk every token weighs those before it, ``P_ij = e^{s_j - L_i}`` for j <= i: a small lower-triangular matrix,
so that the means are one product, and so is the backward pass. Between chunks one triple is carried. The exponents are
taken relative to each row's own maximum, never to the chunk's. Sums are float32; the products take three tf32 passes.

With ``TRITON_INTERPRET=1`` in the environment before triton is imported, everything runs on CPU tensors, slowly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 256


def _sizes(values: Tensor) -> tuple[int, int]:
    """Tokens of a chunk and the padded width: chunks shrink where rows are wide, so that two tiles fit registers."""
    block = max(16, triton.next_power_of_2(values.shape[3]))
    if block > MAX_WIDTH:
        raise ValueError(f"the tiles of backend 'gpu' hold {MAX_WIDTH} value channels; got {values.shape[3]}")
    return (64 if block <= 64 else 32), block


def forward(
    scores: Tensor,
    values: Tensor,
    maximum: Tensor,
    denominator: Tensor,
    numerator: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means ``(B, T, H, V)`` in values' dtype, the last triple, and what ``backward`` wants (empty unless ``save``).

    Arguments as of :func:`.cpu.forward`; V is at most 256.
    """
    batch, time, heads, width = values.shape
    chunk, block = _sizes(values)
    out = torch.empty_like(values)
    last = [torch.empty_like(x) for x in (maximum, denominator, numerator)]
    saved = scores.new_empty((2, *scores.shape) if save else (0,))
    with torch.cuda.device_of(values):
        forward_kernel[(maximum.shape[0] * heads,)](
            scores,
            values,
            maximum,
            denominator,
            numerator,
            cu_seqlens,
            out,
            *last,
            saved if save else None,
            time,
            batch * time * heads,
            heads,
            V=width,
            CHUNK=chunk,
            BLOCK=block,
            num_warps=4,
        )
    return out, last[0], last[1], last[2], saved


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
    """Gradients of scores, values and the first triple, the last maximum held fixed (the caller adds its share)."""
    batch, time, heads, width = values.shape
    chunk, block = _sizes(values)
    grad_scores, grad_values = torch.empty_like(scores), torch.empty_like(values)
    grad_first = [torch.empty_like(x) for x in (maximum, denominator, numerator)]
    with torch.cuda.device_of(values):
        backward_kernel[(maximum.shape[0] * heads,)](
            grad_o,
            grad_denominator,
            grad_numerator,
            scores,
            values,
            maximum,
            denominator,
            numerator,
            o,
            last_maximum,
            last_denominator,
            saved,
            cu_seqlens,
            grad_scores,
            grad_values,
            *grad_first,
            time,
            batch * time * heads,
            heads,
            V=width,
            CHUNK=chunk,
            BLOCK=block,
            num_warps=4,
        )
    return grad_scores, grad_values, grad_first[0], grad_first[1], grad_first[2]


@triton.jit
def _bounds(sequence, cu_seqlens, time):
    """First token of a sequence and the end of it, in the flattened tokens."""
    if cu_seqlens is None:
        begin = sequence.to(tl.int64) * time
        end = begin + time
    else:
        begin = tl.load(cu_seqlens + sequence)
        end = tl.load(cu_seqlens + sequence + 1)
    return begin, end


@triton.jit
def _finite(maximum):
    """What sums can be taken relative to: the maximum, or 0 where nothing was seen yet."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _largest(a, b):
    return tl.where((a > b) | (a != a), a, b)  # NaN wins: it stays in its row


@triton.jit(do_not_specialize=["time", "plane"])
def forward_kernel(
    scores,
    values,
    maximum,
    denominator,
    numerator,
    cu_seqlens,
    out,
    last_maximum,
    last_denominator,
    last_numerator,
    saved,
    time,
    plane,
    heads,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0)
    head = item % heads
    begin, end = _bounds(item // heads, cu_seqlens, time)
    index = tl.arange(0, CHUNK)
    channels = tl.arange(0, BLOCK)
    own = channels < V
    lower = index[:, None] >= index[None, :]
    base = tl.load(maximum + item)
    mass = tl.load(denominator + item)
    total = tl.load(numerator + item * V + channels, mask=own, other=0.0)
    for first in range(begin, end, CHUNK):
        token = first + index
        inside = token < end
        place = token * heads + head
        s = tl.load(scores + place, mask=inside, other=-float("inf"))
        tile = place[:, None] * V + channels[None, :]
        both = inside[:, None] & own[None, :]
        v = tl.load(values + tile, mask=both, other=0.0).to(tl.float32)
        visible = tl.where(lower, s[None, :], -float("inf"))
        rows = _largest(tl.max(visible, axis=1), base)
        relative = _finite(rows)
        weights = tl.exp(visible - relative[:, None])
        past = tl.exp(base - relative)
        sums = tl.sum(weights, axis=1) + past * mass
        products = _dot(weights, v) + past[:, None] * total[None, :]
        means = products / tl.where(sums == 0.0, 1.0, sums)[:, None]
        tl.store(out + tile, means.to(out.dtype.element_ty), mask=both)
        if saved is not None:
            tl.store(saved + place, rows, mask=inside)
            tl.store(saved + plane + place, sums, mask=inside)
        # rows after the end repeat the last real one
        final = index == CHUNK - 1
        base = tl.sum(tl.where(final, rows, 0.0), axis=0)
        mass = tl.sum(tl.where(final, sums, 0.0), axis=0)
        total = tl.sum(tl.where(final[:, None], products, 0.0), axis=0)
    tl.store(last_maximum + item, base)
    tl.store(last_denominator + item, mass)
    tl.store(last_numerator + item * V + channels, total, mask=own)


@triton.jit(do_not_specialize=["time", "plane"])
def backward_kernel(
    grad_out,
    grad_last_denominator,
    grad_last_numerator,
    scores,
    values,
    maximum,
    denominator,
    numerator,
    out,
    last_maximum,
    last_denominator,
    saved,
    cu_seqlens,
    grad_scores,
    grad_values,
    grad_maximum,
    grad_denominator,
    grad_numerator,
    time,
    plane,
    heads,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``later`` is the sum of e^{L - L_i} do_i over all later i, ``dots`` that of e^{L - L_i} do_i . o_i.

    L is that of the carried place, with maximum ``base`` and sum ``reference``.
    """
    item = tl.program_id(0)
    head = item % heads
    begin, end = _bounds(item // heads, cu_seqlens, time)
    index = tl.arange(0, CHUNK)
    channels = tl.arange(0, BLOCK)
    own = channels < V
    lower = index[:, None] >= index[None, :]
    base = _finite(tl.load(last_maximum + item))
    mass = tl.load(last_denominator + item)
    reference = tl.where((mass == 0.0) | (begin == end), 1.0, mass)
    later = reference * tl.load(grad_last_numerator + item * V + channels, mask=own, other=0.0)
    dots = -reference * tl.load(grad_last_denominator + item)
    for back in range(0, end - begin, CHUNK):
        first = begin + (end - begin - 1 - back) // CHUNK * CHUNK
        token = first + index
        inside = token < end
        place = token * heads + head
        s = tl.load(scores + place, mask=inside, other=-float("inf"))
        rows = _finite(tl.load(saved + place, mask=inside, other=float("inf")))  # padding weighs 0
        sums = tl.load(saved + plane + place, mask=inside, other=0.0)
        seen = sums != 0.0
        shares = tl.where(seen, 1.0 / tl.where(seen, sums, 1.0), 0.0)
        tile = place[:, None] * V + channels[None, :]
        both = inside[:, None] & own[None, :]
        v = tl.load(values + tile, mask=both, other=0.0).to(tl.float32)
        upstream = tl.load(grad_out + tile, mask=both, other=0.0).to(tl.float32)
        mean = tl.load(out + tile, mask=both, other=0.0).to(tl.float32)
        weights = tl.exp(tl.where(lower, s[None, :] - rows[:, None], -float("inf"))) * shares[:, None]
        to_later = tl.exp(s - base) / reference
        own_dots = tl.sum(upstream * mean, axis=1)
        dv = _dot(tl.trans(weights), upstream) + to_later[:, None] * later[None, :]
        ds = tl.sum(v * dv, axis=1) - tl.sum(weights * own_dots[:, None], axis=0) - to_later * dots
        tl.store(grad_values + tile, dv.to(grad_values.dtype.element_ty), mask=both)
        tl.store(grad_scores + place, ds, mask=inside)
        # carry to the token before this chunk, or to the state before the first
        if first > begin:
            before = (first - 1) * heads + head
            new_base = tl.load(saved + before)
            new_mass = tl.load(saved + plane + before)
        else:
            new_base = tl.load(maximum + item)
            new_mass = 1.0
        fades = tl.exp(new_base - rows) * new_mass * shares
        fade = tl.exp(new_base - base) * new_mass / reference
        later = fade * later + tl.sum(upstream * fades[:, None], axis=0)
        dots = fade * dots + tl.sum(own_dots * fades, axis=0)
        base = _finite(new_base)
        reference = tl.where(new_mass == 0.0, 1.0, new_mass)
    total = tl.load(numerator + item * V + channels, mask=own, other=0.0)
    tl.store(grad_numerator + item * V + channels, later, mask=own)
    tl.store(grad_denominator + item, -dots)
    tl.store(grad_maximum + item, tl.sum(total * later, axis=0) - tl.load(denominator + item) * dots)
