"""Means over prefixes in chunks of plain matrix products: any device, float64, differentiable any number of times."""

import torch
from torch import Tensor

from subquad.kernels import packing

Triple = tuple[Tensor, Tensor, Tensor]
CHUNK = 64


def finite(maximum: Tensor) -> Tensor:
    """What sums can be taken relative to: the maximum, or 0 where nothing was seen yet."""
    return maximum.where(maximum != -torch.inf, 0)


def run(scores: Tensor, values: Tensor, state: Triple, cu_seqlens: Tensor | None) -> tuple[Tensor, Triple]:
    """Outputs ``(B, T, H, V)`` and the last triple; ``scores (B, T, H)`` and ``values (B, T, H, V)`` of one dtype.

    ``state`` is ``(N, H), (N, H), (N, H, V)``, N = B or the number of packed sequences.
    """
    if cu_seqlens is None:
        return means(scores, values, state)
    output = torch.zeros_like(values)
    last = list(state)
    for group in packing.by_length(cu_seqlens.tolist(), values.device):
        own = (scores[0][group.tokens]).where(group.real[..., None], -torch.inf)
        before = (state[0][group.sequences], state[1][group.sequences], state[2][group.sequences])
        o, after = means(own, packing.take(values, group), before)
        tokens = group.tokens[group.real]
        output = output.index_put((torch.zeros_like(tokens), tokens), o[group.real])
        last = [x.index_put((group.sequences,), y) for x, y in zip(last, after)]
    return output, (last[0], last[1], last[2])


def means(scores: Tensor, values: Tensor, state: Triple) -> tuple[Tensor, Triple]:
    """A batch of sequences of one length, chunk after chunk."""
    maximum, denominator, numerator = state
    base = maximum.detach()
    shift = (maximum - finite(base)).exp()  # 1, or 0 for an empty state; it carries the maximum's gradient
    denominator, numerator = denominator * shift, numerator * shift[..., None]
    outputs = []
    for s, v in zip(scores.split(CHUNK, 1), values.split(CHUNK, 1)):
        o, base, denominator, numerator = _chunk(s.mT, v.transpose(1, 2), base, denominator, numerator)
        outputs.append(o.transpose(1, 2))
    largest = torch.maximum(maximum, scores.amax(1))
    shift = (finite(base) - largest.where(largest != -torch.inf, 0)).exp()  # 1, with the gradient of the last maximum
    return torch.cat(outputs, 1), (largest, denominator * shift, numerator * shift[..., None])


def _chunk(
    s: Tensor, v: Tensor, base: Tensor, denominator: Tensor, numerator: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``s (B, H, C)``, ``v (B, H, C, V)`` after sums relative to ``base``: means, the new base and sums."""
    length = s.shape[-1]
    visible = torch.ones(length, length, dtype=torch.bool, device=s.device).tril()
    maxima = torch.maximum(s.detach().cummax(-1).values, base[..., None])
    rows = finite(maxima)
    weights = (s[..., None, :] - rows[..., None]).where(visible, -torch.inf).exp()
    past = (base[..., None] - rows).exp()
    sums = weights.sum(-1) + past * denominator[..., None]
    products = weights @ v + past[..., None] * numerator[..., None, :]
    means = products / sums.where(sums != 0, 1)[..., None]
    return means, maxima[..., -1], sums[..., -1], products[..., -1, :]
