"""The mixer of TNL and TransNormerLLM: gated, normed lightning attention (Qin et al. 2024; 2023, section 3)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.steps import layouts, plan
from subquad.layers.feature_maps import FEATURE_MAPS, feature_map
from subquad.layers.norms import FloatLayerNorm, FloatRMSNorm, SimpleRMSNorm, build_norm
from subquad.layers.registry import unknown_name
from subquad.mixers.contract import MixerOutput, PositionedState, RecurrentMixer, Request, count_tokens, wide
from subquad.mixers.retention import check_slopes, decayed_attention
from subquad.mixers.steps import fits_positions
from subquad.ops import lightning_slopes, window_slopes
from subquad.positions.lrpe import LRPE

SLOPE_RULES: dict[str, Callable[[int, int, int], Tensor]] = {
    "alibi": lambda heads, layer, layers: lightning_slopes(heads, layer, layers, rule="alibi"),
    "paper": lambda heads, layer, layers: lightning_slopes(heads, layer, layers, rule="paper"),
    "window": lambda heads, layer, layers: window_slopes(heads),
    "none": lambda heads, layer, layers: torch.zeros(heads),
}
GATES = ("low_rank_sigmoid", "linear", "none")
OUTPUT_NORMS = ("layer", "rms", "simple_rms", "rms_per_head", "none")


class LightningAttention(RecurrentMixer):
    """``y = W_o (norm(o) * gate(x))`` over lightning attention with ``q, k = SiLU(W x)``.

    The defaults are TNL's. TransNormerLLM's mixer is ``gate="linear", norm="simple_rms", value_activation="identity"``
    and ``lrpe=True`` in the first layer.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        gate: ``"low_rank_sigmoid"`` (``sigmoid(W_2 W_1 x)``), ``"linear"`` (``W_u x``) or ``"none"``.
        norm: over all heads together (``"layer"``, ``"rms"``, ``"simple_rms"``) or ``"rms_per_head"``, or ``"none"``:
            different models, whose weights do not convert.
        slopes: the decay, by rule (``"alibi"``, ``"paper"``, ``"window"``, ``"none"``) or one number per head. They
            are kept in the state dict, so that a model whose layers are edited keeps its behaviour.
        lrpe: linearised relative position encoding on q and k, whose width doubles.
        value_activation: of v, by name.
        norm_eps: of the norm.
    """

    uses_positions = True
    slope: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        causal: bool = True,
        gate: str = "low_rank_sigmoid",
        norm: str = "layer",
        slopes: str | list[float] = "alibi",
        lrpe: bool = False,
        value_activation: str = "silu",
        norm_eps: float = 1e-6,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_dim = self.head_width(dim)
        if gate not in GATES:
            raise unknown_name("gate", gate, GATES)
        if norm not in OUTPUT_NORMS:
            raise unknown_name("norm", norm, OUTPUT_NORMS)
        if isinstance(slopes, str) and slopes not in SLOPE_RULES:
            raise unknown_name("slope rule", slopes, SLOPE_RULES)
        by_rule = SLOPE_RULES[slopes] if isinstance(slopes, str) else SLOPE_RULES["none"]
        given = None if isinstance(slopes, str) else slopes
        self.register_buffer("slope", check_slopes(given, by_rule(num_heads, layer_index, num_layers)))
        self.value_activation = feature_map(value_activation)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.gate_proj: nn.Module | None = None
        if gate == "linear":
            self.gate_proj = nn.Linear(dim, dim, bias=False)
        elif gate == "low_rank_sigmoid":
            low, high = nn.Linear(dim, self.head_dim, bias=False), nn.Linear(self.head_dim, dim, bias=False)
            self.gate_proj = nn.Sequential(low, high, nn.Sigmoid())
        self.per_head = norm == "rms_per_head"
        self.o_norm = build_norm("rms", self.head_dim, norm_eps) if self.per_head else build_norm(norm, dim, norm_eps)
        self.lrpe = LRPE(num_heads, self.head_dim) if lrpe else None

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, PositionedState]:
        past: PositionedState | None = request.state
        positions, seen = count_tokens(x, lengths, request, None if past is None else past.seen)
        q = F.silu(self.q_proj(x)).unflatten(-1, (-1, self.head_dim))
        k = F.silu(self.k_proj(x)).unflatten(-1, (-1, self.head_dim))
        v = self.value_activation(self.v_proj(x)).unflatten(-1, (-1, self.head_dim))
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        # unnormalised sums grow with the length: the norm reads them in float32
        o, state = decayed_attention(wide(q), wide(k), wide(v), self.slope, lengths, request, 1.0)
        o = (self.o_norm(o).flatten(-2) if self.per_head else self.o_norm(o.flatten(-2))).to(x.dtype)
        output: Tensor = self.o_proj(o if self.gate_proj is None else o * self.gate_proj(x))
        return output, PositionedState(state, seen)

    def step(self, x: Tensor, state: PositionedState, positions: Tensor | None) -> MixerOutput | None:
        layer = self._step_layer(x)
        if layer is None or not fits_positions(x, state, positions, self.num_heads, self.head_dim, self.head_dim):
            return None
        results = plan.run("lightning", layer, x, state)
        return None if results is None else MixerOutput(results[0], PositionedState(results[1], results[2]), {})

    def _read_layer(self, read: plan.Reading) -> layouts.Lightning:
        heads, dim, width = (read.value(self, name) for name in ("num_heads", "dim", "head_dim"))
        values = read.value(self, "value_activation")
        read.require(type(self) is LightningAttention and read.absent(self, "lrpe"))
        read.require(values in (FEATURE_MAPS["silu"], FEATURE_MAPS["identity"]))
        gate, gate_high = layouts.nothing(2), layouts.nothing(2)
        if not read.absent(self, "gate_proj"):
            if type(self.gate_proj) is nn.Linear:
                gate = read.linear(self, "gate_proj", dim, dim)
            else:
                factors = read.child(self, "gate_proj", nn.Sequential)
                read.require(len(factors) == 3)
                gate, gate_high = read.linear(factors, "0", width, dim), read.linear(factors, "1", dim, width)
                read.child(factors, "2", nn.Sigmoid)
        norm, norm_weight, norm_bias, norm_eps = self._read_norm(read, dim, width)
        return layouts.Lightning(
            q=read.linear(self, "q_proj", dim, dim),
            k=read.linear(self, "k_proj", dim, dim),
            v=read.linear(self, "v_proj", dim, dim),
            gate=gate,
            gate_high=gate_high,
            o=read.linear(self, "o_proj", dim, dim),
            slope=read.tensor(self, "slope", heads),
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm=norm,
            norm_eps=norm_eps,
            silu_values=values is FEATURE_MAPS["silu"],
            heads=heads,
            width=width,
        )

    def _read_norm(self, read: plan.Reading, dim: int, width: int) -> tuple[int, layouts.Array, layouts.Array, float]:
        kind, weight, bias = type(self.o_norm), layouts.nothing(1), layouts.nothing(1)
        norm = read.child(self, "o_norm", kind)
        if kind is nn.Identity:
            return layouts.NO_NORM, weight, bias, 0.0
        eps = read.value(norm, "eps")
        if kind is SimpleRMSNorm:
            return layouts.SIMPLE_RMS, weight, bias, eps
        read.require(kind in (FloatLayerNorm, FloatRMSNorm))
        per_head = read.value(self, "per_head")
        weight = read.tensor(norm, "weight", width if per_head else dim)
        if kind is FloatRMSNorm:
            return layouts.RMS, weight, bias, eps
        read.require(not per_head)
        return layouts.LAYER, weight, read.tensor(norm, "bias", dim), eps

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> PositionedState:
        width = self.head_dim * (1 if self.lrpe is None else 2)
        state = torch.zeros(batch, self.num_heads, width, self.head_dim, device=device)
        return PositionedState(state, torch.zeros(batch, dtype=torch.int64, device=device))
