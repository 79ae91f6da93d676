"""The gates of causal flow attention in plain torch: any device, float64, differentiable any number of times."""

from typing import NamedTuple

import torch
from torch import Tensor


class FlowOptions(NamedTuple):
    """``eps`` is added where the definition has it; the competition is ``exp(clip(. / temperature))``."""

    eps: float
    clip: float
    temperature: float


def causal_gates(
    q: Tensor, k: Tensor, keep: Tensor | None, sums: Tensor, competition: Tensor, count: Tensor, options: FlowOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each query's read and each key's value is multiplied by, from sums up to and including the token.

    Args:
        q, k: ``(B, T, H, K)`` features, float32 or float64 like all others.
        keep: ``(B, T)`` bool, True = a real token; None: all are. Padding changes no sum.
        sums: ``(B, H, 4, K)`` of earlier tokens: of k, of q, of k n / O and of q n / I.
        competition: ``(B, H)``, the sum of exponentials.
        count: ``(B,)`` number of earlier tokens.

    Returns:
        Allocation over incoming flow ``a_t / I_t`` and competition ``c_t``, both ``(B, T, H)`` and zero at padding; the
        sums and the competition after the last token.
    """
    eps, clip, temperature = options
    real = torch.ones_like(q[..., 0, 0]) if keep is None else keep.to(q.dtype)
    weight = real[..., None, None]
    query, key = q * weight, k * weight
    number = (count[:, None].to(q.dtype) + real.cumsum(1)).clamp(min=1)[..., None]  # (B, T, 1)

    def running(x: Tensor, place: int) -> Tensor:
        return sums[:, None, :, place] + x.cumsum(1)

    all_sums = [running(key, 0), running(query, 1)]
    incoming = ((query + eps) * (all_sums[0] + eps)).sum(-1)
    outgoing = ((key + eps) * (all_sums[1] + eps)).sum(-1)
    all_sums += [running(key * (number / outgoing)[..., None], 2), running(query * (number / incoming)[..., None], 3)]
    conserved_incoming = ((query + eps) * (all_sums[2] + eps)).sum(-1) / number
    conserved_outgoing = ((key + eps) * (all_sums[3] + eps)).sum(-1) / number
    exponential = (conserved_outgoing / temperature).clamp(-clip, clip).exp() * real[..., None]
    total = competition[:, None] + exponential.cumsum(1)
    tiny = torch.finfo(total.dtype).tiny  # before the first real token of a row there is no competition
    allocation = torch.sigmoid(conserved_incoming) / incoming * real[..., None]
    last = torch.stack([x[:, -1] for x in all_sums], dim=2)
    return allocation, number * exponential / total.clamp(min=tiny), last, total[:, -1]
