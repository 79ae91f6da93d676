"""Cross-entropy over a large vocabulary without ever holding all logits.

8,192 tokens by a vocabulary of 49,152 are 1.6 GB of float32 logits, and as much again for their gradient; in chunks of
tokens, recomputed in the backward pass, the peak is one chunk's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_ELEMENTS = 1 << 24  # logits held at once: 64 MB in float32


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of ``hidden @ weight^T + bias`` against ``labels``, in nats.

    Args:
        hidden: ``(..., D)``.
        weight: ``(vocabulary, D)``; bias ``(vocabulary,)``.
        labels: ``(...)`` int64; places with -100 are ignored.
        reduction: ``"mean"`` over the places that count (0 if there is none), ``"sum"``, or ``"none"``: one loss per
            place, 0 where ignored.

    Returns:
        A float32 scalar, or a tensor of labels' shape.

    Example:
        >>> linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100])).exp().round().item()
        4.0
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels must have hidden's shape {tuple(hidden.shape[:-1])}; got {tuple(labels.shape)}")
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    if flat.shape[0] <= size:
        losses = _losses(flat, weight, bias, targets)
    else:
        pieces = zip(flat.split(size), targets.split(size))
        parts = [checkpoint(_losses, h, weight, bias, y, use_reentrant=False) for h, y in pieces]
        losses = torch.cat(parts)
    if reduction == "none":
        return losses.view(labels.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (targets != IGNORED).sum().clamp(min=1)


def _losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
