"""Positions that are added to the embeddings: sinusoids (Vaswani et al. 2017, section 3.5) or a learnt table."""

import math

import torch
from torch import Tensor, nn


class SinusoidalPositions(nn.Module):
    """``sin`` and ``cos`` of ``position / 10000^(2c/D)`` in alternating channels; no limit of length."""

    def __init__(self, dim: int, max_length: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, positions: Tensor) -> Tensor:
        """``(B, T)`` integers -> ``(B, T, D)`` float32."""
        rate = torch.exp(torch.arange(0, self.dim, 2, device=positions.device) * (-math.log(10_000.0) / self.dim))
        angle = positions[..., None].float() * rate
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., : self.dim]


class LearnedPositions(nn.Module):
    """A table of ``max_length`` learnt vectors; a position beyond it is refused."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_length, dim)

    def forward(self, positions: Tensor) -> Tensor:
        """``(B, T)`` integers -> ``(B, T, D)``."""
        if not torch.compiler.is_compiling() and positions.device.type == "cpu" and positions.numel():
            last = int(positions.max())
            if last >= self.table.num_embeddings:
                raise ValueError(
                    f"position {last} lies beyond the {self.table.num_embeddings} learnt positions; "
                    "raise max_position_embeddings or use positions='rope', 'sinusoidal' or 'none'"
                )
        return self.table(positions)
