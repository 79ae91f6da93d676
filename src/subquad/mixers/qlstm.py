"""An LSTM whose gates read the token alone, and the same with the gate of selective state space models.

Source: Sieber et al. 2024, section 5: the quasi-LSTM, and its "reversed sigmoid" ``sigmoid(-z)^alpha``, which is what
the discretisation of a state space model makes of a softplus step.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.layers.short_convolution import ShortConvolution
from subquad.mixers.contract import RecurrentMixer, Request, keep_mask, silence, wide
from subquad.ops import diagonal_scan


class QLSTMState(NamedTuple):
    """The cell, and the last tokens that the convolution can still see."""

    cell: Tensor  # (B, expand D) float32
    tail: Tensor  # (B, conv_size - 1, expand D)


class QLSTM(RecurrentMixer):
    """``y_t = W_o (GELU(g_t) * sigmoid(o_t) * h_t)`` with ``h_t = a_t h_{t-1} + sigmoid(i_t) x_t`` per channel.

    ``[g, x] = W_in u``, x goes through a short convolution, and f, i, o are linear in it. The transition a is
    ``sigmoid(f)``, or ``sigmoid(-f)^alpha`` with a learnt ``alpha >= 0`` per channel if ``reversed_sigmoid``.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; there are no heads, but D must divide into them as
            in the layers beside it.
        reversed_sigmoid: the gate of selective state space models.
        expand: channels of the cell over D.
        conv_size: tokens that the convolution sees.

    Example:
        >>> QLSTM(16)(torch.zeros(1, 3, 16)).output.shape
        torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        reversed_sigmoid: bool = False,
        expand: int = 2,
        conv_size: int = 4,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_width(dim)
        if expand < 1 or conv_size < 1:
            raise ValueError(f"expand and conv_size must be at least 1; got {expand} and {conv_size}")
        self.channels, self.reversed_sigmoid = expand * dim, reversed_sigmoid
        self.in_proj = nn.Linear(dim, 2 * self.channels)
        self.convolution = ShortConvolution(self.channels, conv_size, activation=None, bias=True)
        self.gates = nn.Linear(self.channels, 3 * self.channels)
        self.out_proj = nn.Linear(self.channels, dim)
        if reversed_sigmoid:
            self.exponent = nn.Parameter(torch.ones(self.channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights from N(0, 1 / width in), biases 0, as the paper's experiments start; the exponent at 1."""
        for projection in (self.in_proj, self.gates, self.out_proj):
            nn.init.normal_(projection.weight, 0.0, projection.in_features**-0.5)
            nn.init.zeros_(projection.bias)
        if self.reversed_sigmoid:
            self.exponent.fill_(1.0)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, QLSTMState]:
        past: QLSTMState | None = request.state
        gate, inner = self.in_proj(x).chunk(2, dim=-1)
        inner, tail = self.convolution(
            inner,
            state=None if past is None else past.tail,
            lengths=lengths,
            cu_seqlens=request.cu_seqlens,
            return_state=request.use_state,
        )
        forget, write, read = wide(self.gates(inner)).chunk(3, dim=-1)
        if self.reversed_sigmoid:
            decay = (F.relu(wide(self.exponent)) * F.logsigmoid(-forget)).exp()
        else:
            decay = torch.sigmoid(forget)
        added = torch.sigmoid(write) * wide(inner)
        keep = keep_mask(x, lengths)
        if keep is not None:  # padding adds nothing and keeps everything
            (added,) = silence(keep, added)
            decay = decay.where(keep[..., None], 1)
        h, cell = diagonal_scan(
            decay,
            added,
            initial_state=None if past is None else past.cell,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        output: Tensor = self.out_proj(F.gelu(gate) * (torch.sigmoid(read) * h).to(x.dtype))
        return output, QLSTMState(cell, tail)  # type: ignore[arg-type]

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> QLSTMState:
        tail = self.convolution.init_state(batch, dtype, device)
        return QLSTMState(torch.zeros(batch, self.channels, device=device), tail)
