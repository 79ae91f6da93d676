"""Scans in plain torch: any device, any dtype, differentiable as often as wanted.

``h_t = decay_t h_{t-1} + update_t`` in two levels: all chunks at once from a state of zero, then from chunk to chunk.
Products of decays only ever multiply; a quotient of cumulative products would overflow within a few hundred tokens.
"""

import math

import torch
from torch import Tensor

from subquad.kernels import packing

#: Elements of decays that the selective scan lays out at once; the whole ``(B, T, D, N)`` never exists.
LARGEST_PIECE = 2**22


def linear_scan(decay: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All states ``(B, T, ...)`` of ``h_t = decay_t h_{t-1} + update_t`` from ``state (B, ...)`` on, and the last."""
    time = update.shape[1]
    length = math.isqrt(time - 1) + 1
    padding = -time % length
    if padding:
        shape = (update.shape[0], padding, *update.shape[2:])
        decay = torch.cat([decay, decay.new_ones(shape)], 1)
        update = torch.cat([update, update.new_zeros(shape)], 1)
    decays, updates = (x.unflatten(1, (-1, length)).unbind(2) for x in (decay, update))
    products, states = [decays[0]], [updates[0]]
    for decay_t, update_t in zip(decays[1:], updates[1:]):
        products.append(decay_t * products[-1])
        states.append(torch.addcmul(update_t, decay_t, states[-1]))
    before = [state]
    for product, end in zip(products[-1].unbind(1), states[-1].unbind(1)):
        before.append(torch.addcmul(end, product, before[-1]))
    starts = torch.stack(before[:-1], 1)[:, :, None]
    whole = torch.addcmul(torch.stack(states, 2), torch.stack(products, 2), starts).flatten(1, 2)
    return whole[:, :time], before[-1]


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """``y (B, T, D)`` without the skip, and the last state ``(B, D, N)``: piece after piece of the sequence.

    ``u, delta (B, T, D)``, ``A (D, N)``, ``B, C (B, T, groups, N)``, ``state (B, D, N)``, all of one dtype.
    """
    batch, time, channels = u.shape
    length = max(1, min(time, LARGEST_PIECE // (batch * channels * A.shape[1])))
    per_group = channels // B.shape[2]
    outputs = []
    for piece in range(0, time, length):
        at = slice(piece, piece + length)
        step = delta[:, at, :, None]
        write = (delta[:, at] * u[:, at]).unflatten(2, (-1, per_group))
        update = torch.einsum("btgd,btgn->btgdn", write, B[:, at]).flatten(2, 3)
        states, state = linear_scan(torch.exp(step * A), update, state)
        outputs.append(torch.einsum("btgdn,btgn->btgd", states.unflatten(2, (-1, per_group)), C[:, at]).flatten(2))
    return torch.cat(outputs, 1), state


def packed_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan` of every packed sequence: padding is a step of no time."""
    output = torch.zeros_like(u)
    for group in packing.by_length(cu_seqlens.tolist(), u.device):
        parts = [packing.take(x, group) for x in (u, delta, B, C)]
        y, last = selective_scan(parts[0], parts[1], A, parts[2], parts[3], states[group.sequences])
        output, states = _put(output, states, group, y, last)
    return output, states


def packed_linear_scan(decay: Tensor, update: Tensor, states: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`linear_scan` of every packed sequence."""
    output = torch.zeros_like(update)
    for group in packing.by_length(cu_seqlens.tolist(), update.device):
        kept = packing.take(decay, group) + (~group.real)[..., None].to(decay.dtype)  # a decay of 1 in the padding
        y, last = linear_scan(kept, packing.take(update, group), states[group.sequences])
        output, states = _put(output, states, group, y, last)
    return output, states


def _put(output: Tensor, states: Tensor, group: packing.Group, y: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    tokens = group.tokens[group.real]
    output = output.index_put((torch.zeros_like(tokens), tokens), y[group.real])
    return output, states.index_put((group.sequences,), last)
