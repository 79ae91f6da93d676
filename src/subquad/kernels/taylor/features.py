"""The second-order Taylor features, their layout, and sums over them in plain torch, a segment of tokens at a time.

phi(x) = [1, a x, b x_i x_j for i <= j in rows of i], with a^2 = scale and b = scale, or scale / sqrt(2) for i = j, so
that phi(q) . phi(k) = 1 + s + s^2 / 2 with s = scale q . k. The products x_i x_j and x_j x_i share one place: 153
numbers for d = 16, where the outer product has 273 (Arora et al. 2024, section 4). This layout is that of every state.
"""

import torch
from torch import Tensor

#: Tokens whose features exist at once.
SEGMENT = 1024


def feature_width(width: int) -> int:
    """F = 1 + d + d (d + 1) / 2.

    Example:
        >>> feature_width(16)
        153
    """
    return 1 + width + width * (width + 1) // 2


def taylor_features(x: Tensor, scale: float | None = None) -> Tensor:
    """``(..., d) -> (..., 1 + d + d (d + 1) / 2)`` with ``phi(q) . phi(k) = 1 + s + s^2 / 2``, ``s = scale q . k``.

    Args:
        x: floating point; the features have its dtype, float32 at least (s^2 does not fit 16 bits).
        scale: None is ``d**-0.5``.

    Example:
        >>> q, k = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
        >>> round(float(taylor_features(q, 1.0) @ taylor_features(k, 1.0)), 4)  # s = -1.5
        0.625
    """
    width = x.shape[-1]
    scale = width**-0.5 if scale is None else scale
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    row, column = torch.triu_indices(width, width, device=x.device)
    factor = x.new_full(row.shape, scale).where(row != column, scale * 2**-0.5)
    return torch.cat([torch.ones_like(x[..., :1]), scale**0.5 * x, x[..., row] * x[..., column] * factor], dim=-1)


def sum_features(k: Tensor, values: Tensor, scale: float) -> Tensor:
    """``sum_t phi(k_t) values_t^T``: k ``(B, T, H, d)``, values ``(B, T, H, V)`` -> ``(B, H, F, V)``."""
    parts = zip(k.split(SEGMENT, 1), values.split(SEGMENT, 1))
    sums = [torch.einsum("bthf,bthv->bhfv", taylor_features(key, scale), value) for key, value in parts]
    return torch.stack(sums).sum(0)


def read_features(q: Tensor, state: Tensor, scale: float) -> Tensor:
    """``phi(q_t)^T state``: q ``(B, T, H, d)``, state ``(B, H, F, V)`` -> ``(B, T, H, V)``."""
    parts = [torch.einsum("bthf,bhfv->bthv", taylor_features(query, scale), state) for query in q.split(SEGMENT, 1)]
    return torch.cat(parts, dim=1)
