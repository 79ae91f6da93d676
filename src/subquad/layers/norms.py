"""Norms by name. Those that torch has are torch's."""

import torch
from torch import Tensor, nn

from subquad.layers.registry import unknown_name


class SimpleRMSNorm(nn.Module):
    """``x / (|x|_2 / sqrt(D) + eps)``: RMS norm without parameters (TransNormerLLM, Qin et al. 2023, eq. 8).

    Shape ``(..., D)`` in and out, any floating dtype; the sum of squares is taken in float32 or above.

    Example:
        >>> SimpleRMSNorm()(torch.tensor([3.0, -3.0])).round(decimals=4).tolist()
        [1.0, -1.0]
    """

    def __init__(self, dim: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # the gradient of a vector norm at zero is zero, so a zero row is harmless
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return (wide / (size + self.eps)).to(x.dtype)


class FloatRMSNorm(nn.RMSNorm):
    """torch's RMS norm, computed in float32 for half-precision input: sums of linear attention can be large."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and x.dtype.itemsize >= 4:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return nn.functional.rms_norm(wide, self.normalized_shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class FloatLayerNorm(nn.LayerNorm):
    """torch's layer norm, computed in float32 for half-precision weights or input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and x.dtype.itemsize >= 4:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return nn.functional.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


NORMS = {
    "rms": lambda dim, eps: FloatRMSNorm(dim, eps=eps),
    "layer": lambda dim, eps: FloatLayerNorm(dim, eps=eps),
    "simple_rms": lambda dim, eps: SimpleRMSNorm(dim, eps=eps),
    "none": lambda dim, eps: nn.Identity(),
}


def build_norm(name: str, dim: int, eps: float = 1e-6) -> nn.Module:
    """The norm called ``name`` (a key of ``NORMS``) over the last axis of ``dim`` channels."""
    if name not in NORMS:
        raise unknown_name("norm", name, NORMS)
    return NORMS[name](dim, eps)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(sum x^2 + eps)`` over the last axis, in float32; at zero the gradient is finite."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
