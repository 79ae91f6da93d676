"""Retention as a mixer: linear attention with rotary positions and a fixed decay per head (Sun et al. 2023)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.steps import layouts, plan
from subquad.layers.norms import FloatRMSNorm, build_norm
from subquad.mixers.contract import (
    MixerOutput,
    PositionedState,
    RecurrentMixer,
    Request,
    count_tokens,
    keep_mask,
    silence,
)
from subquad.mixers.steps import fits_positions
from subquad.ops import lightning_attention, retention_slopes, simple_gla
from subquad.positions.rope import apply_rope, rope_rates


class Retention(RecurrentMixer):
    """Multi-scale retention: ``y = W_o (norm(o) * SiLU(W_g x))``, head h decaying by ``1 - 2^(-5-h)`` per token.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        expand_k, expand_v: total key and value width over D (the paper: 1 and 2).
        slopes: the heads' decay in nats per token; None is the paper's list.
        rope_base: base of the rotary embedding of q and k.
        norm_eps: of the norm on each head's output.
    """

    uses_positions = True
    slope: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = True,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        slopes: list[float] | None = None,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        self.head_k_dim = self.head_width(key_dim, "expand_k * dim")
        self.head_v_dim = self.head_width(value_dim, "expand_v * dim")
        if self.head_k_dim % 2:
            raise ValueError(f"rotary positions need an even key width per head; it is {self.head_k_dim}")
        self.rope_base = rope_base
        self.register_buffer("slope", check_slopes(slopes, retention_slopes(num_heads)))
        self.q_proj = nn.Linear(dim, key_dim, bias=False)
        self.k_proj = nn.Linear(dim, key_dim, bias=False)
        self.v_proj = nn.Linear(dim, value_dim, bias=False)
        self.g_proj = nn.Linear(dim, value_dim, bias=False)
        self.o_proj = nn.Linear(value_dim, dim, bias=False)
        self.o_norm = build_norm("rms", self.head_v_dim, norm_eps)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, PositionedState]:
        past: PositionedState | None = request.state
        positions, seen = count_tokens(x, lengths, request, None if past is None else past.seen)
        q = apply_rope(self.q_proj(x).unflatten(-1, (-1, self.head_k_dim)), positions, self.rope_base)
        k = apply_rope(self.k_proj(x).unflatten(-1, (-1, self.head_k_dim)), positions, self.rope_base)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_v_dim))
        o, state = decayed_attention(q, k, v, self.slope, lengths, request, self.head_k_dim**-0.5)
        gate = F.silu(self.g_proj(x)).unflatten(-1, (-1, self.head_v_dim))
        output: Tensor = self.o_proj((self.o_norm(o) * gate).flatten(-2))
        return output, PositionedState(state, seen)

    def step(self, x: Tensor, state: PositionedState, positions: Tensor | None) -> MixerOutput | None:
        layer = self._step_layer(x)
        if layer is None or not fits_positions(x, state, positions, self.num_heads, self.head_k_dim, self.head_v_dim):
            return None
        places = state.seen if positions is None else positions
        results = plan.run("retention", layer, x, state, places.data_ptr())
        return None if results is None else MixerOutput(results[0], PositionedState(results[1], results[2]), {})

    def _read_layer(self, read: plan.Reading) -> layouts.Retention:
        names = ("num_heads", "dim", "head_k_dim", "head_v_dim", "rope_base")
        heads, dim, head_k_dim, head_v_dim, rope_base = (read.value(self, name) for name in names)
        read.require(type(self) is Retention)
        key_dim, value_dim = heads * head_k_dim, heads * head_v_dim
        norm = read.child(self, "o_norm", FloatRMSNorm)
        return layouts.Retention(
            q=read.linear(self, "q_proj", key_dim, dim),
            k=read.linear(self, "k_proj", key_dim, dim),
            v=read.linear(self, "v_proj", value_dim, dim),
            gate=read.linear(self, "g_proj", value_dim, dim),
            o=read.linear(self, "o_proj", dim, value_dim),
            slope=read.tensor(self, "slope", heads),
            rates=rope_rates(head_k_dim, rope_base).numpy(),
            norm_weight=read.tensor(norm, "weight", head_v_dim),
            norm_eps=read.value(norm, "eps"),
            heads=heads,
            width=head_k_dim,
            columns=head_v_dim,
        )

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> PositionedState:
        state = torch.zeros(batch, self.num_heads, self.head_k_dim, self.head_v_dim, device=device)
        return PositionedState(state, torch.zeros(batch, dtype=torch.int64, device=device))


def check_slopes(slopes: list[float] | None, default: Tensor) -> Tensor:
    """The slopes given, one per head and none negative, or the default ones."""
    if slopes is None:
        return default.to(torch.float32)
    if len(slopes) != len(default) or min(slopes) < 0:
        raise ValueError(f"slopes must be {len(default)} numbers >= 0, one per head; got {slopes}")
    return torch.tensor(slopes, dtype=torch.float32)


def decayed_attention(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, lengths: Tensor | None, request: Request, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with a constant decay per head; padding at the end of a row neither writes nor decays."""
    past = None if request.state is None else request.state.state
    common = {
        "scale": scale,
        "initial_state": past,
        "return_state": request.use_state,
        "cu_seqlens": request.cu_seqlens,
    }
    keep = keep_mask(q, lengths)
    if keep is None:
        return lightning_attention(q, k, v, slope, **common)  # type: ignore[arg-type, return-value]
    k, v, log_decay = silence(keep, k, v, -slope.expand(*q.shape[:2], -1))
    return simple_gla(q, k, v, log_decay, **common)  # type: ignore[arg-type, return-value]
