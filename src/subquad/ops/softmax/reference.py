"""Softmax attention as defined (Vaswani et al. 2017, eq. 1), with an explicit table of who sees whom."""

import torch
from torch import Tensor


def softmax_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` over the visible keys; a query that sees none gets zero and ``-inf``.

    q ``(B, T, H, K)``, k, v ``(B, S, G, .)`` with H a multiple of G, visible ``(B, T, S)`` -> output ``(B, T, H, V)``,
    log-sum-exp ``(B, T, H)``.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = scale * torch.einsum("bthk,bshk->bths", q, k)
    scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    log_sum_exp = torch.logsumexp(scores, dim=-1)
    weights = (scores - log_sum_exp[..., None].masked_fill(log_sum_exp[..., None] == -torch.inf, 0)).exp()
    return torch.einsum("bths,bshv->bthv", weights, v), log_sum_exp
