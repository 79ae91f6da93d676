"""Rotary position embedding (Su et al. 2021, section 3.2), in the half-split layout of the Llama family."""

import torch
from torch import Tensor


def rope_rates(
    width: int, base: float, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Tensor:
    """Radians per position of each pair of channels, ``base^(-2c/K)``, ``(K / 2,)``."""
    return base ** (-torch.arange(0, width, 2, dtype=dtype, device=device) / width)


def apply_rope(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotates pairs of channels (c, c + K/2) of x by ``position * base^(-2c/K)``.

    Args:
        x: ``(B, T, H, K)``, K even.
        positions: ``(B, T)`` or ``(T,)`` integers.
        base: the longest wavelength over 2 pi.

    Raises:
        ValueError: an odd width.

    Example: position 0 does not turn.
        >>> x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> apply_rope(x, torch.zeros(1, 1))[0, 0, 0].tolist()
        [1.0, 0.0]
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"rotary embedding turns pairs of channels: the head width must be even; it is {width}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    angle = (positions[..., None].to(dtype) * rope_rates(width, base, dtype, x.device))[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
