"""Injective linear attention as defined: every pair's score, less the query's mean score.

Source: Han et al. 2024, "Bridging the Divide: Reconsidering Softmax and Linear Attention", eq. 4 and 5; the caller
applies the feature map. The number of keys is meant, also where there are more or fewer queries.
"""

import torch
from torch import Tensor


def injective_weights(q: Tensor, k: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """``w_ij = (scale / n) q_i . k_j - mean_l (scale / n) q_i . k_l + 1 / n``: rows sum to 1, of either sign.

    q ``(B, T, H, K)``, k ``(B, S, H, K)``, mask ``(B, S)``; n is the number of real keys, means are over them; padding
    weighs nothing. -> ``(B, H, T, S)``.
    """
    keep = k.new_ones(k.shape[:2]) if mask is None else mask.to(k.dtype)
    keep = keep[:, None, None, :]
    number = keep.sum(-1, keepdim=True).clamp(min=1)
    scores = scale / number * torch.einsum("bihk,bjhk->bhij", q, k)
    mean = (scores * keep).sum(-1, keepdim=True) / number
    return (scores - mean + 1 / number) * keep


def injective_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """``output_i = sum_j w_ij v_j``."""
    return torch.einsum("bhij,bjhv->bihv", injective_weights(q, k, scale=scale, mask=mask), v)
