"""Mamba: a short convolution and a selective scan inside one gated block (Gu and Dao 2023, section 3.4)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.steps import layouts, plan
from subquad.layers.short_convolution import ShortConvolution
from subquad.mixers.contract import MixerOutput, RecurrentMixer, Request, keep_mask, wide
from subquad.ops.selective_scan import gated_selective_scan

STEP_RANGE = (1e-3, 0.1)  # of the steps at first, log-uniform
LEAST_STEP = 1e-4


class MambaState(NamedTuple):
    """The states of all channels, and the last inputs of the short convolution."""

    state: Tensor  # (B, channels, N) float32
    tail: Tensor  # (B, width - 1, channels)


class StepProjection(nn.Module):
    """The logits of the steps from their bottleneck: ``W r``; the bias is added in the scan, in float32.

    At first softplus of the bias is log-uniform in ``STEP_RANGE`` and the weight uniform within ``rank^-1/2``.
    """

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, rank))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        step = self.bias.uniform_(*map(math.log, STEP_RANGE)).exp().clamp(min=LEAST_STEP)
        self.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Mamba(RecurrentMixer):
    """``y = W_o (scan(u) * SiLU(z))`` with ``[x, z] = W_i input``, ``u = SiLU(conv(x))``: no attention, no heads.

    The scan's step, input map and output map come from u: ``[r, B, C] = W_x u``, ``delta = softplus(W_dt r + b)``.
    Submodules are named as in transformers' ``MambaMixer``.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; there are no heads, but D must divide into them as
            in the layers beside it.
        expand: channels over D.
        state_size: N, states per channel.
        conv_size: width of the short convolution.
        step_rank: width of the bottleneck that computes the step; None is D / 16, rounded up.
        bias, conv_bias: whether the in- and out-projection, and the convolution, have biases.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = True,
        expand: int = 2,
        state_size: int = 16,
        conv_size: int = 4,
        step_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_width(dim)
        self.step_rank = math.ceil(dim / 16) if step_rank is None else step_rank
        sizes = {"expand": expand, "state_size": state_size, "conv_size": conv_size, "step_rank": self.step_rank}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1; got {size!r}")
        self.channels, self.state_size, self.conv_size = expand * dim, state_size, conv_size
        self.in_proj = nn.Linear(dim, 2 * self.channels, bias=bias)
        self.conv1d = ShortConvolution(self.channels, conv_size, bias=conv_bias)
        self.x_proj = nn.Linear(self.channels, self.step_rank + 2 * state_size, bias=False)
        self.dt_proj = StepProjection(self.step_rank, self.channels)
        self.A_log = nn.Parameter(torch.empty(self.channels, state_size))
        self.D = nn.Parameter(torch.empty(self.channels))
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.channels, dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear maps and convolution as torch starts them, the last one over sqrt(layers); rates 1 to N, skip 1."""
        for part in (self.in_proj, self.x_proj, self.out_proj, self.dt_proj):
            part.reset_parameters()
        self.out_proj.weight /= math.sqrt(self.num_layers)
        bound = self.conv1d.weight.shape[1] ** -0.5
        for parameter in self.conv1d.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        rates = torch.arange(1, self.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(rates.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, MambaState]:
        past: MambaState | None = request.state
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self.conv1d(
            x,
            state=None if past is None else past.tail,
            lengths=lengths,
            cu_seqlens=request.cu_seqlens,
            return_state=request.use_state,
        )
        low, B, C = self.x_proj(u).split([self.step_rank, self.state_size, self.state_size], dim=-1)
        delta = self.dt_proj(low)
        keep = keep_mask(u, lengths)
        if keep is not None:
            delta = delta.where(keep[..., None], -math.inf)  # a step of 0
        y, state = gated_selective_scan(
            u,
            delta,
            -wide(self.A_log).exp(),
            B,
            C,
            wide(self.D),
            wide(self.dt_proj.bias),
            gate,
            initial_state=None if past is None else past.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        output: Tensor = self.out_proj(y)
        return output, MambaState(state, tail)  # type: ignore[arg-type]

    def step(self, x: Tensor, state: MambaState, positions: Tensor | None) -> MixerOutput | None:
        layer, rows = self._step_layer(x), x.shape[0]
        if layer is None or positions is not None or type(state) is not MambaState:
            return None
        channels, width = layer.taps.shape
        fits = plan.fits(state.state, rows, channels, self.state_size)
        if not fits or not plan.fits(state.tail, rows, width - 1, channels):
            return None
        results = plan.run("mamba", layer, x, (state.state, state.tail))
        return None if results is None else MixerOutput(results[0], MambaState(*results[1:]), {})

    def _read_layer(self, read: plan.Reading) -> layouts.Mamba:
        names = ("dim", "channels", "state_size", "step_rank", "conv_size")
        dim, channels, states, rank, width = (read.value(self, name) for name in names)
        read.require(type(self) is Mamba)
        convolution = read.child(self, "conv1d", ShortConvolution)
        read.require(read.value(convolution, "activation") == "silu")
        projection = read.child(self, "dt_proj", StepProjection)
        unbiased = read.absent(convolution, "bias")
        return layouts.Mamba(
            inner=read.linear(self, "in_proj", 2 * channels, dim),
            taps=read.tensor(convolution, "weight", channels, width),
            taps_bias=layouts.nothing(1) if unbiased else read.tensor(convolution, "bias", channels),
            maps=read.linear(self, "x_proj", rank + 2 * states, channels),
            step=read.tensor(projection, "weight", channels, rank),
            step_bias=read.tensor(projection, "bias", channels),
            rate_log=read.tensor(self, "A_log", channels, states),
            skip=read.tensor(self, "D", channels),
            o=read.linear(self, "out_proj", dim, channels),
        )

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> MambaState:
        state = torch.zeros(batch, self.channels, self.state_size, device=device)
        return MambaState(state, self.conv1d.init_state(batch, dtype, device))
