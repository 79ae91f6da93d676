"""The gated short convolution of Based (Arora et al. 2024, section 3.2; Arora et al. 2023, "Zoology", appendix)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad.layers.short_convolution import ShortConvolution
from subquad.mixers.contract import RecurrentMixer, Request


class TailState(NamedTuple):
    """The last tokens that a short convolution can still see."""

    tail: Tensor  # (B, width - 1, channels)


class BaseConv(RecurrentMixer):
    """``y = W_o (SiLU(conv(a)) * b)`` with ``[a, b] = W_i x + bias``: a gated convolution over a few tokens.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; there are no heads, but D must divide into them as
            in the layers beside it.
        expand: width of a and b together over D.
        conv_size: tokens that the convolution sees, the current one included.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        expand: int = 4,
        conv_size: int = 3,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_width(dim)
        if expand < 2 or expand * dim % 2 or conv_size < 1:
            raise ValueError(
                f"expand must be at least 2 and expand * dim even, conv_size at least 1; got {expand}, {conv_size}"
            )
        channels = expand * dim // 2
        self.i_proj = nn.Linear(dim, 2 * channels)
        self.convolution = ShortConvolution(channels, conv_size)
        self.o_proj = nn.Linear(channels, dim)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, TailState]:
        a, b = self.i_proj(x).chunk(2, dim=-1)
        mixed, tail = self.convolution(
            a,
            state=None if request.state is None else request.state.tail,
            lengths=lengths,
            cu_seqlens=request.cu_seqlens,
            return_state=request.use_state,
        )
        output: Tensor = self.o_proj(mixed * b)
        return output, TailState(tail)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> TailState:
        return TailState(self.convolution.init_state(batch, dtype, device))
