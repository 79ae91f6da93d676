"""Prefix linear attention as defined, pair by pair (Arora et al. 2024b, "Just read twice", section 4)."""

import torch
from torch import Tensor


def prefix_linear_attention_reference(
    decoder_weights: Tensor, encoder_weights: Tensor, v: Tensor, prefix_v: Tensor, *, normalize: bool, eps: float
) -> Tensor:
    """Every query adds what it sees of the tokens so far to what it sees of the prefix::

        output_t = (sum_{j <= t} w_tj v_j + sum_{j < M} w'_tj v'_j) / (sum_{j <= t} w_tj + sum_{j < M} w'_tj + eps)

    Weights ``(B, H, T, T)``, zero where a key is not seen; values ``(B, T, H, V)`` -> ``(B, T, H, V)``.
    """
    seen = torch.einsum("bhij,bjhv->bihv", decoder_weights, v) + torch.einsum(
        "bhij,bjhv->bihv", encoder_weights, prefix_v
    )
    if not normalize:
        return seen
    return seen / ((decoder_weights + encoder_weights).sum(-1).mT[..., None] + eps)
