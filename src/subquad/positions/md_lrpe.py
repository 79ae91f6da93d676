"""Relative positions on grids of any number of dimensions, and positions by decayed sums along each of them.

Source: Qin et al. 2024, "You Only Scan Once", section 3.3: MD-LRPE turns queries and keys, MD-TPE stands before the
first layer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import lightning_attention


def grid_coordinates(grid: Sequence[int], extra: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """``(extra + product(grid), m)`` int64: the coordinates of tokens in raster order, after ``extra`` ones at 0.

    Example:
        >>> grid_coordinates((2, 2), extra=1).tolist()
        [[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]
    """
    if not grid or any(size < 1 for size in grid):
        raise ValueError(f"grid must be one or more sizes >= 1; got {tuple(grid)}")
    if extra < 0:
        raise ValueError(f"extra must be at least 0; got {extra}")
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    return F.pad(torch.stack(axes, -1).flatten(0, -2), (0, 0, extra, 0))


class MDLRPE(nn.Module):
    """LRPE over m dimensions: channel c of head h turns by a learnt angle times one coordinate; the width doubles.

    The K channels are dealt out in m runs of ``ceil(K / m)``, the last cut short; run i turns by coordinate i, all runs
    by the same frequencies. The score of two tokens is then a function of the differences of their coordinates.
    Tokens at coordinate 0 (a class token) are not turned. With m = 1 this is :class:`.LRPE`.

    Args:
        num_heads, head_dim: H and K of the input.
        dims: m.

    Example:
        >>> turn = MDLRPE(1, 2, dims=2)
        >>> turn(torch.ones(1, 4, 1, 2), grid_coordinates((2, 2))).shape
        torch.Size([1, 4, 1, 4])
    """

    def __init__(self, num_heads: int, head_dim: int, dims: int) -> None:
        super().__init__()
        if dims < 1 or dims > head_dim:
            raise ValueError(f"dims must lie between 1 and the head's width {head_dim}; got {dims}")
        self.dims, self.head_dim = dims, head_dim
        self.theta = nn.Parameter(torch.empty(num_heads, -(-head_dim // dims)))
        self.theta._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``theta = 10000^(-2c/D)``, c the frequency's index over all heads."""
        total = self.theta.numel()
        channel = torch.arange(total, dtype=self.theta.dtype, device=self.theta.device)
        self.theta.copy_((10_000.0 ** (-2.0 / total * channel)).view_as(self.theta))

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """x ``(B, T, H, K)``, coordinates ``(T, m)`` or ``(B, T, m)`` -> ``(B, T, H, 2K)`` in x's dtype.

        Raises:
            ValueError: coordinates of another number of tokens or dimensions.
        """
        if coordinates.shape[-1] != self.dims or coordinates.shape[-2] != x.shape[1]:
            raise ValueError(
                f"coordinates must be (time, dimensions) = {(x.shape[1], self.dims)}; got {tuple(coordinates.shape)}"
            )
        # (..., T, 1, m, 1) * (H, 1, R) -> (..., T, H, m R), cut to K
        angle = coordinates[..., None, :, None].to(self.theta.dtype) * self.theta[:, None]
        angle = angle.flatten(-2)[..., : self.head_dim]
        wide = x.to(torch.promote_types(x.dtype, self.theta.dtype))
        return torch.cat([wide * angle.cos(), wide * angle.sin()], dim=-1).to(x.dtype)


class MDTPE(nn.Module):
    """``y = sum_i W_i Norm(c_h sum_{s <= t} lambda_h^{t-s} x_s)``, the sum over s running along axis i of the grid.

    It stands before the first layer, in the place of position embeddings. Each axis has decays ``lambda = sigmoid(.)``
    per head, a factor ``c_h = q_h . k_h`` of two learnt vectors, an RMS norm and a projection of its own. Sums run
    forward along each axis: a token knows what lies before it in its row and in its column, and the whole is not causal
    in raster order.

    Args:
        dim: D.
        num_heads: H, a divisor of D.
        dims: m, the axes of the grid.

    Example:
        >>> MDTPE(8, 2, dims=2)(torch.zeros(1, 6, 8), grid=(2, 3)).shape
        torch.Size([1, 6, 8])
    """

    def __init__(self, dim: int, num_heads: int, dims: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of the number of heads {num_heads}; got {dim}")
        if dims < 1:
            raise ValueError(f"dims must be at least 1; got {dims}")
        self.num_heads, self.dims = num_heads, dims
        self.query = nn.Parameter(torch.empty(dims, dim))
        self.key = nn.Parameter(torch.empty(dims, dim))
        self.decay_logit = nn.Parameter(torch.empty(dims, num_heads))
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in range(dims))
        self.projections = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(dims))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decays from a half life of one token to one of some hundred; factors near 1."""
        nn.init.constant_(self.query, 1 / math.sqrt(self.query.shape[1] // self.num_heads))
        nn.init.constant_(self.key, 1 / math.sqrt(self.query.shape[1] // self.num_heads))
        self.decay_logit.copy_(torch.linspace(0.0, 5.0, self.num_heads, device=self.decay_logit.device))

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """x ``(B, T, D)`` in raster order, T the product of the grid -> the same shape.

        Raises:
            ValueError: a grid of another number of axes, or whose product is not T.
        """
        if len(grid) != self.dims or math.prod(grid) != x.shape[1]:
            raise ValueError(
                f"grid must be {self.dims} sizes whose product is the number of tokens {x.shape[1]}; got {tuple(grid)}"
            )
        laid_out = x.unflatten(1, tuple(grid))
        output = torch.zeros_like(x)
        for axis in range(self.dims):
            rows = laid_out.movedim(1 + axis, -2)  # (B, others, size, D)
            sums = self._decayed_sums(rows.flatten(0, -3), axis).view(rows.shape)
            sums = sums.movedim(-2, 1 + axis).flatten(1, -2)
            output = output + self.projections[axis](self.norms[axis](sums))
        return output

    def _decayed_sums(self, rows: Tensor, axis: int) -> Tensor:
        factor = (self.query[axis] * self.key[axis]).unflatten(0, (self.num_heads, -1)).sum(-1)
        heads = rows.unflatten(-1, (self.num_heads, -1))
        one = heads.new_ones(1).expand(*heads.shape[:3], 1)
        slope = F.softplus(-self.decay_logit[axis].to(torch.promote_types(rows.dtype, torch.float32)))
        summed, _ = lightning_attention(one, one, heads, slope)
        return (summed * factor[:, None].to(summed.dtype)).flatten(-2)
