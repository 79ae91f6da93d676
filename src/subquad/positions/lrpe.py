"""Linearised relative position encoding for linear attention (Qin et al. 2023, LRPE-d; TransNormerLLM, section 3.1)."""

import torch
from torch import Tensor, nn


class LRPE(nn.Module):
    """Turns channel c of head h by a learnt angle ``theta * t``: the width doubles to ``[x cos, x sin]``.

    The score of two tokens becomes ``sum_c q_c k_c cos(theta_c (t - j))``: a function of their distance.

    Args:
        num_heads, head_dim: H and K of the input.

    Example:
        >>> lrpe = LRPE(1, 2)
        >>> lrpe(torch.ones(1, 1, 1, 2), torch.zeros(1, 1)).flatten().tolist()
        [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, head_dim))
        self.theta._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``theta = 10000^(-2c/D)``, c the channel's index over all heads."""
        dim = self.theta.numel()
        channel = torch.arange(dim, dtype=self.theta.dtype, device=self.theta.device)
        self.theta.copy_((10_000.0 ** (-2.0 / dim * channel)).view_as(self.theta))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x ``(B, T, H, K)``, positions ``(B, T)`` -> ``(B, T, H, 2K)`` in x's dtype; angles in float32."""
        angle = positions[..., None, None].to(self.theta.dtype) * self.theta
        wide = x.to(torch.promote_types(x.dtype, self.theta.dtype))
        return torch.cat([wide * angle.cos(), wide * angle.sin()], dim=-1).to(x.dtype)
