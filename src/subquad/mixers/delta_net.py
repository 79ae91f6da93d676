"""The delta-rule mixers: DeltaNet, its gated form, and several updates per token.

Sources: Yang et al. 2024b (DeltaNet), section 3.4; Yang et al. 2025 (gated), section 3.4; Grazzi et al. 2025 (negative
eigenvalues); Siems et al. 2025 (DeltaProduct).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.steps import layouts, plan
from subquad.layers.norms import FloatRMSNorm, build_norm, l2_normalize
from subquad.layers.registry import unknown_name
from subquad.layers.short_convolution import ConvolutionTails, QKVConvolutions
from subquad.mixers.contract import MixerOutput, RecurrentMixer, Request, keep_mask, silence, wide
from subquad.mixers.convolved import convolved_projections
from subquad.mixers.steps import fits_tails, read_convolutions
from subquad.ops import delta_product, delta_rule, gated_delta_rule

QK_ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "elu+1": lambda x: F.elu(x) + 1, "identity": lambda x: x}
QK_NORMS = {"l2": l2_normalize, "sum": lambda x: x / x.sum(-1, keepdim=True).clamp(min=1e-6)}
EIGENVALUES = ((0, 1), (-1, 1))


class DeltaState(NamedTuple):
    """The matrix state and the last tokens of the short convolutions."""

    state: Tensor  # (B, H, K, V) float32
    tails: ConvolutionTails


def beta_range(eigenvalues: tuple[int, int] | list[int]) -> float:
    """The largest beta that keeps ``I - beta k k^T`` within ``eigenvalues``: 1 for (0, 1), 2 for (-1, 1)."""
    if tuple(eigenvalues) not in EIGENVALUES:
        raise ValueError(f"eigenvalues must be (0, 1) or (-1, 1); got {eigenvalues!r}")
    return float(1 - eigenvalues[0])


class DeltaNet(RecurrentMixer):
    """``S_t = (I - beta k k^T) S_{t-1} + beta k v^T`` with unit keys after a short convolution.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        expand_k, expand_v: total key and value width over D.
        num_value_heads: heads of v, beta and the state, a multiple of H: several read and write with one q and k; None
            is H.
        conv_size: width of the short convolutions on q, k, v; 0: none.
        eigenvalues: range of the state's transition: ``(0, 1)``, or ``(-1, 1)`` for state tracking (beta up to 2).
        qk_activation, qk_norm: of q and k after the convolution; ``"elu+1"`` with ``"sum"`` is the rule of 2021. A silu
            activation happens inside the convolution.
        output_gate: whether the normed output is multiplied by ``SiLU(W_g x)``.
        norm_eps: of the norm on each head's output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = True,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        num_value_heads: int | None = None,
        conv_size: int = 4,
        eigenvalues: tuple[int, int] = (0, 1),
        qk_activation: str = "silu",
        qk_norm: str = "l2",
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if qk_activation not in QK_ACTIVATIONS:
            raise unknown_name("qk_activation", qk_activation, QK_ACTIVATIONS)
        if qk_norm not in QK_NORMS:
            raise unknown_name("qk_norm", qk_norm, QK_NORMS)
        if qk_norm == "sum" and qk_activation not in ("relu", "elu+1"):
            raise ValueError(
                f"qk_norm='sum' needs an activation that is not negative: relu or elu+1; got {qk_activation!r}"
            )
        self.num_value_heads = num_value_heads or num_heads
        if self.num_value_heads % num_heads:
            raise ValueError(f"num_value_heads must be a multiple of num_heads {num_heads}; got {num_value_heads}")
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        self.head_k_dim = self.head_width(key_dim, "expand_k * dim")
        self.head_v_dim = self.head_width(value_dim, "expand_v * dim", self.num_value_heads)
        self.largest_beta = beta_range(eigenvalues)
        self.activation, self.normalize = QK_ACTIVATIONS[qk_activation], QK_NORMS[qk_norm]
        self.q_proj = nn.Linear(dim, key_dim, bias=False)
        self.k_proj = nn.Linear(dim, key_dim, bias=False)
        self.v_proj = nn.Linear(dim, value_dim, bias=False)
        self.b_proj = nn.Linear(dim, self.num_value_heads, bias=False)
        self.g_proj = nn.Linear(dim, value_dim, bias=False) if output_gate else None
        self.o_proj = nn.Linear(value_dim, dim, bias=False)
        self.o_norm = build_norm("rms", self.head_v_dim, norm_eps)
        self.convolutions = QKVConvolutions(key_dim, key_dim, value_dim, conv_size, activation=None)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, DeltaState]:
        q, k, v, tails = convolved_projections(self, x, lengths, request)
        q = self.normalize(self.activation(q).unflatten(-1, (-1, self.head_k_dim)))
        k = self.normalize(self.activation(k).unflatten(-1, (-1, self.head_k_dim)))
        v = F.silu(v).unflatten(-1, (-1, self.head_v_dim))
        shared = self.num_value_heads // self.num_heads
        if shared > 1:
            q, k = (t.repeat_interleave(shared, dim=2) for t in (q, k))
        # float32 from here: 2 * 0.996 would end the memory of a sign within 300 tokens
        beta = self.largest_beta * torch.sigmoid(wide(self.b_proj(x)))
        k, v, beta = silence(keep_mask(x, lengths), k, v, beta)
        o, state = self._update(x, q, k, v, beta, lengths, request)
        o = self.o_norm(o)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x)).unflatten(-1, (-1, self.head_v_dim))
        output: Tensor = self.o_proj(o.flatten(-2))
        return output, DeltaState(state, tails)

    def _update(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        lengths: Tensor | None,
        request: Request,
    ) -> tuple[Tensor, Tensor]:
        return delta_rule(  # type: ignore[return-value]
            q,
            k,
            v,
            beta,
            initial_state=None if request.state is None else request.state.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )

    def step(self, x: Tensor, state: DeltaState, positions: Tensor | None) -> MixerOutput | None:
        layer, rows = self._step_layer(x), x.shape[0]
        if layer is None or positions is not None or type(state) is not DeltaState:
            return None
        fits = plan.fits(state.state, rows, self.num_value_heads, self.head_k_dim, self.head_v_dim)
        if not fits or not fits_tails(state.tails, layer, rows):
            return None
        results = plan.run("delta", layer, x, (state.state, *state.tails))
        if results is None:
            return None
        return MixerOutput(results[0], DeltaState(results[1], ConvolutionTails(*results[2:])), {})

    def _read_layer(self, read: plan.Reading) -> layouts.Delta:
        names = ("num_heads", "num_value_heads", "dim", "head_k_dim", "head_v_dim", "largest_beta")
        heads, value_heads, dim, head_k_dim, head_v_dim, largest_beta = (read.value(self, name) for name in names)
        key_dim, value_dim = heads * head_k_dim, value_heads * head_v_dim
        read.require(type(self) in (DeltaNet, GatedDeltaNet))
        read.require(read.value(self, "activation") is F.silu and read.value(self, "normalize") is l2_normalize)
        norm = read.child(self, "o_norm", FloatRMSNorm)
        convolutions = read.child(self, "convolutions", QKVConvolutions)
        taps = read_convolutions(read, convolutions, None, key_dim, key_dim, value_dim)
        forget, rate_log, bias = layouts.nothing(2), layouts.nothing(1), layouts.nothing(1)
        if type(self) is GatedDeltaNet:
            gate = read.child(self, "gate", ForgetGate)
            forget = read.linear(gate, "proj", value_heads, dim)
            rate_log, bias = read.tensor(gate, "A_log", value_heads), read.tensor(gate, "dt_bias", value_heads)
        return layouts.Delta(
            q=read.linear(self, "q_proj", key_dim, dim),
            k=read.linear(self, "k_proj", key_dim, dim),
            v=read.linear(self, "v_proj", value_dim, dim),
            beta=read.linear(self, "b_proj", value_heads, dim),
            gate=layouts.nothing(2) if read.absent(self, "g_proj") else read.linear(self, "g_proj", value_dim, dim),
            forget=forget,
            forget_rate_log=rate_log,
            forget_bias=bias,
            o=read.linear(self, "o_proj", dim, value_dim),
            q_taps=taps[0],
            k_taps=taps[1],
            v_taps=taps[2],
            norm_weight=read.tensor(norm, "weight", head_v_dim),
            norm_eps=read.value(norm, "eps"),
            largest_beta=largest_beta,
            heads=value_heads,
            width=head_k_dim,
            columns=head_v_dim,
        )

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> DeltaState:
        state = torch.zeros(batch, self.num_value_heads, self.head_k_dim, self.head_v_dim, device=device)
        return DeltaState(state, self.convolutions.init_state(batch, dtype, device))


class GatedDeltaNet(DeltaNet):
    """The delta rule on a state that decays by ``exp(g)``, ``g = -exp(A) softplus(W_a x + b)``, one gate per head.

    Args: those of :class:`DeltaNet`; the widths default to the paper's proportions and the output gate is on.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = True,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        num_value_heads: int | None = None,
        conv_size: int = 4,
        eigenvalues: tuple[int, int] = (0, 1),
        output_gate: bool = True,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            causal=causal,
            expand_k=expand_k,
            expand_v=expand_v,
            num_value_heads=num_value_heads,
            conv_size=conv_size,
            eigenvalues=eigenvalues,
            output_gate=output_gate,
            norm_eps=norm_eps,
            layer_index=layer_index,
            num_layers=num_layers,
        )
        self.gate = ForgetGate(dim, self.num_value_heads)

    def _update(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        lengths: Tensor | None,
        request: Request,
    ) -> tuple[Tensor, Tensor]:
        (log_decay,) = silence(keep_mask(x, lengths), self.gate(x))
        return gated_delta_rule(  # type: ignore[return-value]
            q,
            k,
            v,
            log_decay,
            beta,
            initial_state=None if request.state is None else request.state.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )


class HeadDecay(nn.Module):
    """``-exp(A_log) softplus(logit + dt_bias)``: a log decay per head, as in Mamba-2 (Dao & Gu 2024), float32.

    A starts uniform in (0, 16), the step log-uniform in [1e-3, 1e-1]; neither is decayed by the optimizer.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A_log.uniform_(1e-4, 16).log_()
        step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(self, logit: Tensor) -> Tensor:
        """``(..., H)`` -> the same shape, at most 0."""
        return -wide(self.A_log).exp() * F.softplus(wide(logit) + wide(self.dt_bias))


class ForgetGate(HeadDecay):
    """:class:`HeadDecay` of a projection, ``(B, T, D)`` -> ``(B, T, H)``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(num_heads)
        self.proj = nn.Linear(dim, num_heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.proj(x))


class DeltaProduct(RecurrentMixer):
    """Several delta updates per token, each with a key, value and strength of its own.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        num_householder: n, updates per token; n = k - 1 can carry out any permutation of k things.
        eigenvalues: range of each factor; ``(-1, 1)`` makes them reflections.
        gated: whether the state decays once per token, before the first update.
        expand_k, expand_v, conv_size, output_gate, norm_eps: see :class:`DeltaNet`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        causal: bool = True,
        num_householder: int = 2,
        eigenvalues: tuple[int, int] = (-1, 1),
        gated: bool = False,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_size: int = 4,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if num_householder < 1:
            raise ValueError(f"num_householder must be at least 1; got {num_householder}")
        key_dim, value_dim = round(dim * expand_k), round(dim * expand_v)
        self.head_k_dim = self.head_width(key_dim, "expand_k * dim")
        self.head_v_dim = self.head_width(value_dim, "expand_v * dim")
        self.num_householder, self.largest_beta = num_householder, beta_range(eigenvalues)
        self.q_proj = nn.Linear(dim, key_dim, bias=False)
        self.k_proj = nn.Linear(dim, key_dim * num_householder, bias=False)
        self.v_proj = nn.Linear(dim, value_dim * num_householder, bias=False)
        self.b_proj = nn.Linear(dim, num_heads * num_householder, bias=False)
        self.g_proj = nn.Linear(dim, value_dim, bias=False) if output_gate else None
        self.o_proj = nn.Linear(value_dim, dim, bias=False)
        self.o_norm = build_norm("rms", self.head_v_dim, norm_eps)
        self.gate = ForgetGate(dim, num_heads) if gated else None
        widths = (key_dim, key_dim * num_householder, value_dim * num_householder)
        self.convolutions = QKVConvolutions(*widths, conv_size)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, DeltaState]:
        past: DeltaState | None = request.state
        q, k, v, tails = convolved_projections(self, x, lengths, request)
        updates = (self.num_householder, self.num_heads, -1)
        q = l2_normalize(q.unflatten(-1, (-1, self.head_k_dim)))
        k = l2_normalize(k.unflatten(-1, updates))
        v = v.unflatten(-1, updates)
        beta = self.largest_beta * torch.sigmoid(wide(self.b_proj(x))).unflatten(-1, updates[:2])
        keep = keep_mask(x, lengths)
        k, v, beta = silence(keep, k, v, beta)
        log_decay = None if self.gate is None else silence(keep, self.gate(x))[0]
        o, state = delta_product(
            q,
            k,
            v,
            beta,
            log_decay,
            initial_state=None if past is None else past.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        o = self.o_norm(o)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x)).unflatten(-1, (-1, self.head_v_dim))
        output: Tensor = self.o_proj(o.flatten(-2))
        return output, DeltaState(state, tails)  # type: ignore[arg-type]

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> DeltaState:
        state = torch.zeros(batch, self.num_heads, self.head_k_dim, self.head_v_dim, device=device)
        return DeltaState(state, self.convolutions.init_state(batch, dtype, device))
