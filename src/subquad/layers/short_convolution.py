"""The short causal convolution as a layer with weights."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from subquad.ops.convolution import short_convolution


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over the last ``width`` tokens, then SiLU.

    Args:
        dim: channels D.
        width: taps W.
        activation: ``"silu"`` or None.
        bias: whether each channel has a bias.
    """

    def __init__(self, dim: int, width: int = 4, activation: str | None = "silu", bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, width))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.activation = activation
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])  # torch's own start for one input channel per output
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        *,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x ``(B, T, D)`` -> the same shape, and the last ``width - 1`` tokens ``(B, width - 1, D)`` if asked for."""
        return short_convolution(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            lengths=lengths,
            initial_state=state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
        )

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        dim, width = self.weight.shape
        return torch.zeros(batch, width - 1, dim, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[1]}, activation={self.activation}"


class ConvolutionTails(NamedTuple):
    """The last tokens of the convolutions on q, k, v, ``(B, width - 1, channels)`` each; None where there is none."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None


class QKVConvolutions(nn.Module):
    """Short convolutions on the projections q, k and v, each with weights of its own; ``width=0``: none at all."""

    def __init__(self, q_dim: int, k_dim: int, v_dim: int, width: int, activation: str | None = "silu") -> None:
        super().__init__()
        self.width = width
        if width:
            self.q = ShortConvolution(q_dim, width, activation)
            self.k = ShortConvolution(k_dim, width, activation)
            self.v = ShortConvolution(v_dim, width, activation)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        state: ConvolutionTails | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, ConvolutionTails]:
        """q, k, v ``(B, T, channels)`` -> the same after convolution, and the tails (all None unless asked for)."""
        if not self.width:
            return q, k, v, ConvolutionTails(None, None, None)
        past = state or ConvolutionTails(None, None, None)
        common = {"lengths": lengths, "cu_seqlens": cu_seqlens, "return_state": return_state}
        q, q_tail = self.q(q, state=past.q, **common)
        k, k_tail = self.k(k, state=past.k, **common)
        v, v_tail = self.v(v, state=past.v, **common)
        return q, k, v, ConvolutionTails(q_tail, k_tail, v_tail)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> ConvolutionTails:
        if not self.width:
            return ConvolutionTails(None, None, None)
        return ConvolutionTails(*(c.init_state(batch, dtype, device) for c in (self.q, self.k, self.v)))
