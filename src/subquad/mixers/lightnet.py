"""LightNet's mixer: linear attention normalised by a running mass, in one pass over any number of dimensions."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.layers.norms import build_norm
from subquad.layers.short_convolution import ConvolutionTails, QKVConvolutions
from subquad.mixers.contract import (
    MixerOutput,
    Pattern,
    RecurrentMixer,
    Request,
    count_tokens,
    keep_mask,
    silence,
    wide,
)
from subquad.mixers.convolved import convolved_projections
from subquad.ops import additive_gates, additive_weights, gla, linear_attention
from subquad.positions.md_lrpe import MDLRPE, grid_coordinates


class LightNetState(NamedTuple):
    """Weighted means of the values, the log mass behind them, the tokens seen, and tails of the convolutions."""

    state: Tensor  # (B, H, K or 2K, V) float32
    log_mass: Tensor  # (B, H, K) float32
    seen: Tensor  # (B,) int64
    tails: ConvolutionTails


class LightNet(RecurrentMixer):
    """``y = W_o (RMSNorm(o) * SiLU(W_2 W_1 x))`` over additive attention, ``q = SiLU(W_q x)`` (Qin et al. 2024).

    Row c of the state is the mean of the values under ``softmax(k_c)`` over the tokens so far; without ``causal`` over
    all tokens at once, so that images and other grids need one pass, whatever the number of their dimensions.

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`; the paper's heads are 128 wide.
        expand_ratio: K, the key width of a head; None is D / H.
        gate_rank: width of the bottleneck of the output gate.
        conv_size: width of short convolutions on q, k, v (causal self-attention only); 0: none.
        initial_mass: what the sum of weights starts from, 0 or 1 (1 in causal use only).
        lrpe_dims: turn q and the normalised keys by MD-LRPE over so many dimensions; 0: no positions. With more than
            one a call needs its ``grid``; tokens before the grid (class tokens) are not turned.
        context_dim: width of the context in cross-attention; None is D.
        norm_eps: of the norm over all heads.

    Example:
        >>> mixer = LightNet(16, 2, causal=False, lrpe_dims=2)
        >>> mixer(torch.zeros(1, 12, 16), grid=(3, 4)).output.shape
        torch.Size([1, 12, 16])
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.FULL_SELF, Pattern.CAUSAL_CROSS, Pattern.FULL_CROSS})
    uses_positions = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        expand_ratio: int | None = None,
        gate_rank: int = 128,
        conv_size: int = 0,
        initial_mass: int = 0,
        lrpe_dims: int = 0,
        context_dim: int | None = None,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_v_dim = self.head_width(dim)
        self.head_k_dim = self.head_v_dim if expand_ratio is None else expand_ratio
        if self.head_k_dim < 1 or gate_rank < 1:
            raise ValueError(f"expand_ratio and gate_rank must be at least 1; got {expand_ratio} and {gate_rank}")
        if initial_mass not in (0, 1) or (initial_mass and not causal):
            raise ValueError(f"initial_mass must be 0, or 1 in causal use; got {initial_mass} with causal={causal}")
        if conv_size and not causal:
            raise ValueError("short convolutions are causal: conv_size needs causal=True")
        if causal and lrpe_dims > 1:
            raise ValueError(f"causal use reads tokens in one order: lrpe_dims must be 0 or 1; got {lrpe_dims}")
        self.initial_mass, key_dim = initial_mass, num_heads * self.head_k_dim
        self.q_proj = nn.Linear(dim, key_dim, bias=False)
        self.k_proj = nn.Linear(context_dim or dim, key_dim, bias=False)
        self.v_proj = nn.Linear(context_dim or dim, dim, bias=False)
        self.g_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, dim, bias=False))
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.o_norm = build_norm("rms", dim, norm_eps)
        self.convolutions = QKVConvolutions(key_dim, key_dim, dim, conv_size, activation=None)
        self.lrpe = MDLRPE(num_heads, self.head_k_dim, lrpe_dims) if lrpe_dims else None

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if self.causal and context is None:
            self._refuse_grid(request.grid)
            return super().mix(x, context, request)
        if context is not None and self.lrpe is not None:
            raise ValueError("LRPE tells places in one sequence: cross-attention needs lrpe_dims=0")
        source = x if context is None else context
        q, k, v = self._heads(self.q_proj(x), self.k_proj(source), self.v_proj(source))
        if request.mask is not None:
            k = k.where(request.mask[..., None, None], -torch.inf)
        key = additive_weights(k, cu_seqlens=request.cu_seqlens).to(v.dtype)
        if self.lrpe is not None:
            coordinates = self._coordinates(x, request)
            q, key = self.lrpe(q, coordinates), self.lrpe(key, coordinates)
        else:
            self._refuse_grid(request.grid, x.shape[1])
        o, _ = linear_attention(q, key, v, causal=False, cu_seqlens=request.cu_seqlens)
        output = self._output(o, x)
        if context is None:
            (output,) = silence(request.mask, output)
        return MixerOutput(output, request.state if request.use_state else None, {})

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, LightNetState]:
        past: LightNetState | None = request.state
        q, k, v, tails = convolved_projections(self, x, lengths, request)
        q, k, v = self._heads(q, k, v)
        keep = keep_mask(x, lengths)
        if keep is not None:  # a token that is not there: its weight e^k is 0, and the mass stays
            k = k.where(keep[..., None, None], -torch.inf)
        gates = additive_gates(
            wide(k),
            initial_mass=self.initial_mass,
            log_mass=None if past is None else past.log_mass,
            cu_seqlens=request.cu_seqlens,
        )
        positions, seen = count_tokens(x, lengths, request, None if past is None else past.seen)
        key, log_decay = gates.key.to(v.dtype), gates.log_decay
        if self.lrpe is not None:
            q, key = self.lrpe(q, positions[..., None]), self.lrpe(key, positions[..., None])
            log_decay = torch.cat([log_decay, log_decay], -1)
        o, state = gla(
            q,
            key,
            v,
            log_decay,
            scale=1.0,
            initial_state=None if past is None else past.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        return self._output(o, x), LightNetState(state, gates.log_mass, seen, tails)  # type: ignore[arg-type]

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = F.silu(q).unflatten(-1, (-1, self.head_k_dim)), k.unflatten(-1, (-1, self.head_k_dim))
        return q, k, v.unflatten(-1, (-1, self.head_v_dim))

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        output: Tensor = self.o_proj(self.o_norm(o.flatten(-2)) * F.silu(self.g_proj(x)))
        return output

    def _coordinates(self, x: Tensor, request: Request) -> Tensor:
        """``(T, m)``, or ``(B, T, 1)`` where tokens are counted."""
        assert self.lrpe is not None
        if request.grid is None and self.lrpe.dims == 1:
            lengths = None if request.mask is None else request.mask.sum(1)
            positions, _ = count_tokens(x, lengths, request, None)
            if request.mask is not None and request.positions is None:
                positions = (request.mask.cumsum(1) - 1).clamp(min=0)
            return positions[..., None]
        if request.grid is None or len(request.grid) != self.lrpe.dims:
            raise ValueError(f"lrpe_dims={self.lrpe.dims} needs a grid of so many sizes; got {request.grid}")
        extra = x.shape[1] - math.prod(request.grid)
        if extra < 0 or request.cu_seqlens is not None:
            raise ValueError(f"grid {request.grid} must hold the {x.shape[1]} tokens of one sequence, unpacked")
        return grid_coordinates(request.grid, extra, x.device)

    @staticmethod
    def _refuse_grid(grid: tuple[int, ...] | None, tokens: int | None = None) -> None:
        """A grid without a use is taken where it fits: without positions, the order of tokens changes nothing."""
        if grid is None:
            return
        if tokens is None and len(grid) > 1:
            raise ValueError(f"causal use reads tokens in one order; build with causal=False for the grid {grid}")
        if tokens is not None and math.prod(grid) > tokens:
            raise ValueError(f"grid {grid} holds more than the {tokens} tokens there are")

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> LightNetState:
        keys = self.head_k_dim * (1 if self.lrpe is None else 2)
        state = torch.zeros(batch, self.num_heads, keys, self.head_v_dim, device=device)
        log = 0.0 if self.initial_mass else -float("inf")
        log_mass = torch.full((batch, self.num_heads, self.head_k_dim), log, device=device)
        seen = torch.zeros(batch, dtype=torch.int64, device=device)
        return LightNetState(state, log_mass, seen, self.convolutions.init_state(batch, dtype, device))
