"""The neural memory chunk by chunk in plain torch: within a chunk all gradients are taken at the same weights.

A token's gradient by layer l is then the outer product of the layer's input ``h_j`` and a residual ``r_j``, and what
the tokens of the chunk have added to the layer by token t is ``sum_j c_tj h_j r_j^T``: it is applied to a query without
ever being formed (Behrouz et al. 2025, section 3.2, in the dual form of Sun et al. 2024, section 2.5). Only the loop
over chunks is sequential.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.ops.neural_memory.network import Descent, gelu_with_slope, layer_norm, layer_norm_transposed

CHUNKS_PER_CHECKPOINT = 8
LARGEST_TAPE = 2**26  # bytes of weights that the tape may keep before chunks are computed again in the backward


class Coefficients(NamedTuple):
    """How far the tokens of a chunk, and what was there before them, have come into the weights by token t.

    ``M_t = decay_t M_0 + carried_t S_0 - sum_j written_tj gradient_j`` and, after the chunk's last token,
    ``S_C = momentum S_0 - sum_j pushed_j gradient_j``.
    """

    decay: Tensor  # (..., C)
    carried: Tensor  # (..., C)
    written: Tensor  # (..., C, C)
    momentum: Tensor  # (...,)
    pushed: Tensor  # (..., C)


class Carry(NamedTuple):
    """What goes from chunk to chunk, a tensor ``(rows * heads, width in, width out)`` per layer."""

    weights: list[Tensor]
    surprise: list[Tensor]
    kept: list[Tensor]  # the weights before the chunk in which a row ends


class Chunk(NamedTuple):
    """The tokens of one chunk, ``(rows * heads, C, .)``."""

    q: Tensor
    k: Tensor
    v: Tensor
    coefficients: Coefficients
    ends: Tensor | None  # (rows * heads, 1, 1) bool, the row's last token is in this chunk; None: not asked for


def coefficients_of(forget: Tensor, momentum: Tensor, step: Tensor, real: Tensor) -> Coefficients:
    """From gates ``(..., C)``; tokens that are not ``real (..., C)`` change nothing. No quotients: gates may be 0."""
    size = forget.shape[-1]
    one = torch.ones_like(forget)
    keep, push = torch.where(real, 1 - forget, one), torch.where(real, momentum, one)
    step, adds = step.where(real, 0), real.to(forget.dtype)
    place = torch.eye(size + 1, dtype=forget.dtype, device=forget.device)
    s = place[size].expand(*forget.shape[:-1], size + 1)  # the last column is the surprise before the chunk
    m, rows = torch.zeros_like(s), []
    for t in range(size):
        s = push[..., t, None] * s + step[..., t, None] * place[t]
        m = keep[..., t, None] * m + adds[..., t, None] * s
        rows.append(m)
    written = torch.stack(rows, dim=-2)
    decay = torch.stack(_running_product(keep), dim=-1)
    return Coefficients(decay, written[..., size], written[..., :size], s[..., size], s[..., :size])


def _running_product(x: Tensor) -> list[Tensor]:
    products = [x[..., 0]]
    for t in range(1, x.shape[-1]):
        products.append(products[-1] * x[..., t])
    return products


def run_chunk(carry: Carry, chunk: Chunk, start: list[Tensor], descent: Descent) -> tuple[Carry, Tensor]:
    """One chunk whose gradients are taken at ``start``: the weights after it, and its outputs."""
    weights, surprise, kept = carry
    if chunk.ends is not None:
        kept = [torch.where(chunk.ends, now, before) for now, before in zip(start, kept)]
    inputs, residuals = _gradients(start, chunk, descent)
    decay, carried, written, momentum, pushed = chunk.coefficients
    decay_after, carried_after = decay[:, -1:, None], carried[:, -1:, None]
    momentum, written_after, pushed = momentum[:, None, None], written[:, -1, :, None], pushed[..., None]
    decay, carried = decay[..., None], carried[..., None]

    # signs go to the small factors: a factor of baddbmm would cost a pass over the weights in the backward
    written, written_after, pushed = -written, -written_after, -pushed
    x = chunk.q
    new_weights, new_surprise = [], []
    for number, (w, s, h, r) in enumerate(zip(weights, surprise, inputs, residuals)):
        if number:
            x = F.gelu(x)
        known = torch.addcmul(decay * (x @ w), carried, x @ s)
        x = torch.baddbmm(known, (x @ h.mT) * written, r)
        before = torch.addcmul(decay_after * w, carried_after, s)
        new_weights.append(torch.baddbmm(before, (written_after * h).mT, r))
        new_surprise.append(torch.baddbmm(momentum * s, (pushed * h).mT, r))
    output = chunk.q + layer_norm(x)[0] if descent.network.norm_residual else x
    return Carry(new_weights, new_surprise, kept), output


def _gradients(layers: list[Tensor], chunk: Chunk, descent: Descent) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer inputs ``h (., C, width in)`` and residuals ``r (., C, width out)``: a gradient is ``h_j r_j^T``."""
    inputs, slopes = [chunk.k], []
    for layer in layers[:-1]:
        h, slope = gelu_with_slope(inputs[-1] @ layer)
        inputs.append(h)
        slopes.append(slope)
    output = inputs[-1] @ layers[-1]
    if descent.network.norm_residual:
        normed, inverse = layer_norm(output)
        residual = layer_norm_transposed(2 * (chunk.k + normed - chunk.v), normed, inverse)
    else:
        residual = 2 * (output - chunk.v)
    residuals = [residual]
    for layer, slope in zip(reversed(layers[1:]), reversed(slopes)):
        residuals.append((residuals[-1] @ layer.mT) * slope)
    residuals.reverse()
    if descent.max_grad_norm is not None:
        squares = [h.square().sum(-1) * r.square().sum(-1) for h, r in zip(inputs, residuals)]
        size = torch.stack(squares).sum(0).clamp(min=descent.max_grad_norm**2)
        factor = descent.max_grad_norm * torch.rsqrt(size)[..., None]
        residuals = [r * factor for r in residuals]
    return inputs, residuals


def neural_memory_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forget: Tensor,
    momentum: Tensor,
    step: Tensor,
    *,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    lengths: Tensor | None,
    descent: Descent,
    from_start: bool,
    return_state: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Equal to :func:`subquad.ops.neural_memory.reference.neural_memory_reference`.

    ``from_start`` says that every row begins with an empty chunk, so that no grid has to be shifted; ``lengths`` None
    that all tokens are real. Without ``return_state`` the third part of the state means nothing.
    """
    rows, time, heads = forget.shape
    network, chunk_size = descent.network, descent.chunk_size
    weights, surprise, start, filled = state
    shift = None if from_start else filled
    one_token = time == 1 and shift is not None
    width = 1 if one_token else chunk_size
    span = 1 if one_token else -(-(time + (0 if from_start else chunk_size - 1)) // chunk_size) * chunk_size
    first = None if one_token else shift
    at = torch.arange(time, device=q.device).expand(rows, -1) + (0 if first is None else first[:, None])

    def lay(x: Tensor) -> Tensor:
        """``(rows, T, H, .)`` -> ``(chunks, rows * heads, C, .)``, every row from the start of its open chunk."""
        if first is None:
            laid = F.pad(x, (0, 0) * (x.ndim - 2) + (0, span - time))
        else:
            laid = x.new_zeros(rows, span, *x.shape[2:])
            laid = laid.scatter(1, at.reshape(rows, time, *[1] * (x.ndim - 2)).expand_as(x), x)
        return laid.unflatten(1, (-1, width)).movedim(3, 1).movedim(2, 0).flatten(1, 2)

    counts = lengths if lengths is not None else torch.full((rows,), time, device=q.device)
    real = (torch.arange(time, device=q.device) < counts[:, None])[..., None].expand(-1, -1, heads)
    gates = (lay(forget), lay(momentum), lay(step), lay(real))
    coefficients = coefficients_of(*gates)

    ended = filled + counts
    last_chunk = ended // chunk_size
    first_end = time // chunk_size if lengths is None else 0

    def ends(number: int) -> Tensor | None:
        if not return_state or one_token or number < first_end:
            return None
        return (last_chunk == number).repeat_interleave(heads)[:, None, None]

    def layers(x: Tensor) -> list[Tensor]:
        return network.layers(x.flatten(0, 1))

    pieces = (*(lay(x).unbind(0) for x in (q, k, v)), *(x.unbind(0) for x in coefficients))
    chunks = [
        Chunk(parts[0], parts[1], parts[2], Coefficients(*parts[3:]), ends(number))
        for number, parts in enumerate(zip(*pieces))
    ]
    opened = layers(weights)
    if shift is not None:
        fresh = (shift == 0).repeat_interleave(heads)[:, None, None]
        opened = [torch.where(fresh, now, before) for now, before in zip(opened, layers(start))]
    carry = Carry(layers(weights), layers(surprise), opened)
    carry, outputs = _run(carry, chunks, opened, descent)

    output = torch.stack(outputs).unflatten(1, (rows, heads)).movedim(0, 2).flatten(2, 3).transpose(1, 2)
    output = (
        output[:, :time] if first is None else output.gather(1, at[..., None, None].expand(-1, -1, *output.shape[2:]))
    )
    if lengths is not None:
        output = output.where(real[..., None], 0)

    def flat(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten(1) for part in parts], dim=-1).unflatten(0, (rows, heads))

    weights, kept = flat(carry.weights), flat(carry.kept)
    filled = ended % chunk_size
    start = torch.where((filled == 0)[:, None, None], weights, kept)
    return output, (weights, flat(carry.surprise), start, filled)


def _run(carry: Carry, chunks: list[Chunk], opened: list[Tensor], descent: Descent) -> tuple[Carry, list[Tensor]]:
    """All chunks in order; where the tape would be large, groups of them are computed again in the backward."""

    def group(carry: Carry, start: list[Tensor] | None, members: list[Chunk]) -> tuple[Carry, list[Tensor]]:
        outputs = []
        for chunk in members:
            carry, output = run_chunk(carry, chunk, carry.weights if start is None else start, descent)
            start = None
            outputs.append(output)
        return carry, outputs

    tape = 2 * len(chunks) * sum(w.numel() * w.element_size() for w in carry.weights)
    if not torch.is_grad_enabled() or tape <= LARGEST_TAPE:
        return group(carry, opened, chunks)
    outputs: list[Tensor] = []
    start: list[Tensor] | None = opened
    for first in range(0, len(chunks), CHUNKS_PER_CHECKPOINT):
        members = chunks[first : first + CHUNKS_PER_CHECKPOINT]
        carry, own = checkpoint(group, carry, start, members, use_reentrant=False)
        outputs += own
        start = None
    return carry, outputs
