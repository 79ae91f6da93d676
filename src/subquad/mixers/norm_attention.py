"""TransNormer's two mixers: linear attention normed instead of normalised, and softmax inside blocks.

Source: Qin et al. 2022, "The Devil in Linear Transformer", section 4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.packing import locate
from subquad.layers.feature_maps import feature_map as get_feature_map
from subquad.layers.norms import build_norm
from subquad.layers.registry import unknown_name
from subquad.mixers.contract import (
    MatrixState,
    MixerOutput,
    Pattern,
    RecurrentMixer,
    Request,
    keep_mask,
    silence,
    wide,
)
from subquad.ops import linear_attention, softmax_attention

WEIGHTS = ("softmax", "relu")


class GatedRMSNorm(nn.Module):
    """RMS norm, then times ``sigmoid(g * x)`` with a learnt vector g that starts at 1 (ReLA, Zhang et al. 2021)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = build_norm("rms", dim, eps)
        self.gate = nn.Parameter(torch.ones(dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.ones_(self.gate)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed * torch.sigmoid(self.gate * x)


def _output_norm(name: str, dim: int) -> nn.Module:
    return GatedRMSNorm(dim) if name == "gated_rms" else build_norm(name, dim)


class NormAttention(RecurrentMixer):
    """``y = W_o Norm(sum_j phi(q_t) . phi(k_j) v_j)``: no denominator, one norm over all heads together.

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`.
        feature_map: ``"elu"`` (the paper's T1) or ``"elu+1"`` (T2).
        norm: ``"rms"``, ``"gated_rms"``, ``"simple_rms"``, ``"layer"`` or ``"none"``.
        gate: the second version's output gate ``SiLU(W_u x)`` with SiLU on v.
        bias: of the projections.
        context_dim: width of the context in cross-attention; None is D.

    With a context (cross-attention) all of it is visible, causal or not.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.FULL_SELF, Pattern.CAUSAL_CROSS, Pattern.FULL_CROSS})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        feature_map: str = "elu+1",
        norm: str = "rms",
        gate: bool = False,
        bias: bool = True,
        context_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_dim = self.head_width(dim)
        self.phi = get_feature_map(feature_map)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(context_dim or dim, dim, bias=bias)
        self.v_proj = nn.Linear(context_dim or dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        self.u_proj = nn.Linear(dim, dim, bias=bias) if gate else None
        self.o_norm = _output_norm(norm, dim)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if self.causal and context is None:
            return super().mix(x, context, request)
        q, k, v = self._project(x, x if context is None else context)
        k, v = silence(request.mask, k, v)
        o, _ = linear_attention(wide(q), wide(k), wide(v), causal=False, cu_seqlens=request.cu_seqlens)
        output = self._finish(o, x)
        if context is None:
            (output,) = silence(request.mask, output)
        return MixerOutput(output, request.state if request.use_state else None, {})

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, MatrixState]:
        q, k, v = self._project(x, x)
        k, v = silence(keep_mask(x, lengths), k, v)
        o, state = linear_attention(
            wide(q),
            wide(k),
            wide(v),
            initial_state=None if request.state is None else request.state.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        return self._finish(o, x), MatrixState(state)  # type: ignore[arg-type]

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.phi(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.phi(self.k_proj(source).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(source)
        v = v if self.u_proj is None else F.silu(v)
        return q, k, v.unflatten(-1, (-1, self.head_dim))

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        o = self.o_norm(o.flatten(-2)).to(x.dtype)  # the sums grow with the length: normed in float32
        output: Tensor = self.o_proj(o if self.u_proj is None else F.silu(self.u_proj(x)) * o)
        return output

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> MatrixState:
        return MatrixState(torch.zeros(batch, self.num_heads, self.head_dim, self.head_dim, device=device))


class BlockState(NamedTuple):
    """The tokens of the block that is not yet full, in front of which nothing is remembered."""

    keys: Tensor  # (B, w, H, K)
    values: Tensor  # (B, w, H, V)
    filled: Tensor  # (B,) int64, how many of the w places hold a token


class DiagAttention(RecurrentMixer):
    """Attention inside blocks of ``block_size`` tokens, never across their borders.

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`.
        block_size: w.
        weights: ``"softmax"`` (T2), or ``"relu"`` scores normed after the values (T1).
        norm: of the output with ``weights="relu"``; see :class:`NormAttention`.
        bias: of the projections.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.FULL_SELF})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        block_size: int = 64,
        weights: str = "softmax",
        norm: str = "rms",
        bias: bool = True,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {block_size}")
        if weights not in WEIGHTS:
            raise unknown_name("weights", weights, WEIGHTS)
        self.head_dim, self.block_size, self.weights = self.head_width(dim), block_size, weights
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        self.o_norm = _output_norm(norm, dim) if weights == "relu" else nn.Identity()

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, BlockState]:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if request.cu_seqlens is not None:
            o, state = self._packed(q, k, v, request)
        else:
            o, state = self._in_blocks(q, k, v, lengths, request.state)
        output: Tensor = self.o_proj(self.o_norm(o.flatten(-2)))
        return output, state

    def _in_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, past: BlockState | None
    ) -> tuple[Tensor, BlockState]:
        """Every row is laid out from the start of its open block, so that borders fall where they belong."""
        batch, time = q.shape[:2]
        width, device = self.block_size, q.device
        real = torch.full((batch,), time, device=device) if lengths is None else lengths
        past = past or self.init_state(batch, k.dtype, device)
        start = past.filled
        span = -(-(time + width - 1) // width) * width
        at = start[:, None] + torch.arange(time, device=device)
        index = at[..., None, None].expand_as(q)
        query = q.new_zeros(batch, span, *q.shape[2:]).scatter(1, index, q)

        def lay(old: Tensor, new: Tensor) -> Tensor:
            filled = new.new_zeros(batch, span, *new.shape[2:])
            filled[:, :width] = old.to(new.dtype)
            return filled.scatter(1, index, new)

        key, value = lay(past.keys, k), lay(past.values, v)
        place = torch.arange(span, device=device)
        known = place < (start + real)[:, None]
        in_q, in_k, in_v, in_known = (x.unflatten(1, (-1, width)).flatten(0, 1) for x in (query, key, value, known))
        o = self._attend(in_q, in_k, in_v, in_known)
        o = o.unflatten(0, (batch, -1)).flatten(1, 2).gather(1, index)
        total = start + real
        open_start = total // width * width
        kept = (open_start[:, None] + torch.arange(width, device=device)).clamp(max=span - 1)
        filled = total - open_start
        inside = (torch.arange(width, device=device) < filled[:, None])[..., None, None]
        kept = kept[..., None, None].expand(-1, -1, *k.shape[2:])
        return o, BlockState(key.gather(1, kept).where(inside, 0), value.gather(1, kept).where(inside, 0), filled)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, known: Tensor) -> Tensor:
        if self.weights == "softmax":
            return softmax_attention(q, k, v, causal=self.causal, mask=known)[0]
        scores = torch.relu(torch.einsum("bihk,bjhk->bhij", q, k) * self.head_dim**-0.5)
        visible = known[:, None, None]
        if self.causal:
            visible = visible & torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        return torch.einsum("bhij,bjhv->bihv", scores.where(visible, 0), v)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, request: Request) -> tuple[Tensor, BlockState]:
        """Packed sequences as rows of one padded batch: blocks restart with each sequence."""
        assert request.cu_seqlens is not None
        row, column, sizes = locate(request.cu_seqlens, q.shape[1])
        longest = int(sizes.max())
        q, k, v = (x.new_zeros(len(sizes), longest, *x.shape[2:]).index_put((row, column), x[0]) for x in (q, k, v))
        o, state = self._in_blocks(q, k, v, sizes, request.state)
        return o[row, column][None], state

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if self.causal or request.mask is not None:
            return super().mix(x, context, request)
        output, _ = self.recur(x, None, request)
        return MixerOutput(output, None, {})

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> BlockState:
        shape = (batch, self.block_size, self.num_heads, self.head_dim)
        keys = torch.zeros(shape, dtype=dtype, device=device)
        return BlockState(keys, keys.clone(), torch.zeros(batch, dtype=torch.int64, device=device))
