"""Gated linear attention as a mixer (Yang et al. 2024, section 4.2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.steps import layouts, plan
from subquad.layers.norms import FloatRMSNorm, build_norm
from subquad.layers.short_convolution import ConvolutionTails, QKVConvolutions
from subquad.mixers.contract import MixerOutput, RecurrentMixer, Request, keep_mask, silence, wide
from subquad.mixers.convolved import convolved_projections
from subquad.mixers.steps import fits_tails, read_convolutions
from subquad.ops import gla


class GLAState(NamedTuple):
    """The matrix state, and the last tokens of the short convolutions where there are any."""

    state: Tensor  # (B, H, K, V) float32
    tails: ConvolutionTails


class GatedLinearAttention(RecurrentMixer):
    """``y = W_o (RMSNorm(o) * SiLU(W_r x))`` over gated linear attention, one forget gate per key channel.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`; the paper uses 4 heads.
        num_key_value_heads: heads of k, v and the gate, a divisor of H; None is H.
        expand_k, expand_v: total key and value width over D.
        gate_rank: width of the bottleneck that computes the forget gate.
        gate_temperature: the gate is ``sigmoid(.)^(1 / temperature)``.
        conv_size: width of short convolutions on q, k, v; 0: none (the paper's layer).
        norm_eps: of the norm on each head's output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = True,
        num_key_value_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_temperature: float = 16.0,
        conv_size: int = 0,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.num_key_value_heads = num_key_value_heads or num_heads
        if num_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads must divide num_heads {num_heads}; got {self.num_key_value_heads}")
        self.key_dim, self.value_dim = round(dim * expand_k), round(dim * expand_v)
        self.head_k_dim = self.head_width(self.key_dim, "expand_k * dim")
        self.head_v_dim = self.head_width(self.value_dim, "expand_v * dim")
        groups = num_heads // self.num_key_value_heads
        self.gate_temperature = gate_temperature
        self.q_proj = nn.Linear(dim, self.key_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.key_dim // groups, bias=False)
        self.v_proj = nn.Linear(dim, self.value_dim // groups, bias=False)
        self.g_proj = nn.Linear(dim, self.value_dim, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, self.key_dim // groups, bias=True)
        )
        self.o_proj = nn.Linear(self.value_dim, dim, bias=False)
        self.o_norm = build_norm("rms", self.head_v_dim, norm_eps)
        self.convolutions = QKVConvolutions(self.key_dim, self.key_dim // groups, self.value_dim // groups, conv_size)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, GLAState]:
        past: GLAState | None = request.state
        q, k, v, tails = convolved_projections(self, x, lengths, request)
        q = q.unflatten(-1, (-1, self.head_k_dim))
        k = k.unflatten(-1, (-1, self.head_k_dim))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        # float32 from here: a gate near 1 rounds to 1 in bfloat16
        log_decay = F.logsigmoid(wide(self.gk_proj(x))) / self.gate_temperature
        log_decay = log_decay.unflatten(-1, (-1, self.head_k_dim))
        keep = keep_mask(x, lengths)
        k, v, log_decay = silence(keep, k, v, log_decay)
        groups = self.num_heads // self.num_key_value_heads
        if groups > 1:
            k, v, log_decay = (t.repeat_interleave(groups, dim=2) for t in (k, v, log_decay))
        o, state = gla(
            q,
            k,
            v,
            log_decay,
            initial_state=None if past is None else past.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        gate = F.silu(self.g_proj(x)).unflatten(-1, (-1, self.head_v_dim))
        output: Tensor = self.o_proj((self.o_norm(o) * gate).flatten(-2))
        return output, GLAState(state, tails)  # type: ignore[arg-type]

    def step(self, x: Tensor, state: GLAState, positions: Tensor | None) -> MixerOutput | None:
        layer, rows = self._step_layer(x), x.shape[0]
        if layer is None or positions is not None or type(state) is not GLAState:
            return None
        fits = plan.fits(state.state, rows, self.num_heads, self.head_k_dim, self.head_v_dim)
        if not fits or not fits_tails(state.tails, layer, rows):
            return None
        results = plan.run("gla", layer, x, (state.state, *state.tails))
        if results is None:
            return None
        return MixerOutput(results[0], GLAState(results[1], ConvolutionTails(*results[2:])), {})

    def _read_layer(self, read: plan.Reading) -> layouts.GLA:
        names = ("num_heads", "num_key_value_heads", "dim", "head_k_dim", "head_v_dim", "gate_temperature")
        heads, groups, dim, head_k_dim, head_v_dim, temperature = (read.value(self, name) for name in names)
        read.require(type(self) is GatedLinearAttention)
        norm = read.child(self, "o_norm", FloatRMSNorm)
        forget = read.child(self, "gk_proj", nn.Sequential)
        read.require(len(forget) == 2)
        high = read.child(forget, "1", nn.Linear)
        rank = read.value(high, "in_features")
        convolutions = read.child(self, "convolutions", QKVConvolutions)
        channels = heads * head_k_dim, groups * head_k_dim, groups * head_v_dim
        taps = read_convolutions(read, convolutions, "silu", *channels)
        return layouts.GLA(
            q=read.linear(self, "q_proj", heads * head_k_dim, dim),
            k=read.linear(self, "k_proj", groups * head_k_dim, dim),
            v=read.linear(self, "v_proj", groups * head_v_dim, dim),
            gate=read.linear(self, "g_proj", heads * head_v_dim, dim),
            forget_low=read.linear(forget, "0", rank, dim),
            forget_high=read.tensor(high, "weight", groups * head_k_dim, rank),
            forget_bias=read.tensor(high, "bias", groups * head_k_dim),
            o=read.linear(self, "o_proj", dim, heads * head_v_dim),
            q_taps=taps[0],
            k_taps=taps[1],
            v_taps=taps[2],
            norm_weight=read.tensor(norm, "weight", head_v_dim),
            norm_eps=read.value(norm, "eps"),
            temperature=temperature,
            heads=heads,
            width=head_k_dim,
            columns=head_v_dim,
        )

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> GLAState:
        state = torch.zeros(batch, self.num_heads, self.head_k_dim, self.head_v_dim, device=device)
        return GLAState(state, self.convolutions.init_state(batch, dtype, device))
