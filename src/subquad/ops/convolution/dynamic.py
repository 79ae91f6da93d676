"""A 3 x 3 depthwise convolution whose kernels differ from sample to sample: a local residual on a grid of tokens.

Source: Han et al. 2024, "Bridging the Divide: Reconsidering Softmax and Linear Attention", section 4.2.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from subquad.kernels import backends
from subquad.ops import _contract as contract


def dynamic_depthwise_conv(v: Tensor, r: Tensor, grid: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """``o[b, y, x, d] = sum_ij r[b, d, i, j] v[b, y + i - 1, x + j - 1, d]``, zero outside of the grid.

    Args:
        v: ``(B, N, D)``, tokens in the order of the grid's rows, one of float64, float32, bfloat16, float16.
        r: ``(B, D, 3, 3)`` in v's dtype, a kernel per sample and channel.
        grid: (height, width), N tokens together.
        backend: ``auto``, ``reference``, ``chunked``, ``cpu`` or ``gpu``; never changes the meaning. All but
            ``reference`` are one grouped convolution of torch, of B D groups.

    Returns:
        ``(B, N, D)`` in v's dtype: there is no state.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, a grid of another number of tokens.

    Example:
        >>> import torch
        >>> v = torch.arange(4.0).view(1, 4, 1)
        >>> dynamic_depthwise_conv(v, torch.ones(1, 1, 3, 3), (2, 2)).flatten().tolist()
        [6.0, 6.0, 6.0, 6.0]
    """
    contract.check_tensor("v", v, 3, "(batch, tokens, channels)")
    contract.check_not_empty("v", v)
    batch, tokens, channels = v.shape
    contract.check_argument("r", r, v, (batch, channels, 3, 3), "(batch, channels, 3, 3)")
    if r.dtype != v.dtype:
        raise TypeError(f"v and r must share a dtype; v is {v.dtype}, r is {r.dtype}")
    check_grid(grid, tokens)
    accumulate = contract.accumulation_dtype(v)
    image, kernel = v.to(accumulate).unflatten(1, tuple(grid)), r.to(accumulate)
    if backends.resolve(backend, v.device, v.dtype) == "reference":
        return dynamic_depthwise_conv_reference(image, kernel).flatten(1, 2).to(v.dtype)
    one = image.permute(0, 3, 1, 2).reshape(1, batch * channels, *grid)  # the whole batch as channels of one image
    output = F.conv2d(one, kernel.reshape(batch * channels, 1, 3, 3), padding=1, groups=batch * channels)
    return output.reshape(batch, channels, tokens).transpose(1, 2).to(v.dtype)


def dynamic_depthwise_conv_reference(image: Tensor, kernel: Tensor) -> Tensor:
    """Nine shifted copies of the image ``(B, H, W, D)``, each times its tap of the kernels ``(B, D, 3, 3)``, added."""
    height, width = image.shape[1:3]
    padded = F.pad(image, (0, 0, 1, 1, 1, 1))
    shifted = (
        padded[:, row : row + height, column : column + width] * kernel[:, None, None, :, row, column]
        for row in range(3)
        for column in range(3)
    )
    return sum(shifted, image.new_zeros(()))


def check_grid(grid: Any, tokens: int) -> None:
    """(height, width) of ``tokens`` tokens together."""
    if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(isinstance(n, int) and n >= 1 for n in grid):
        raise ValueError(f"grid must be (height, width), integers >= 1; got {grid!r}")
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"grid {tuple(grid)} holds {grid[0] * grid[1]} tokens; there are {tokens}")
