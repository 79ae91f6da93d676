"""Flow attention as a mixer (Wu et al. 2022, "Flowformer", section 3)."""

import torch
from torch import Tensor, nn

from subquad.layers.registry import unknown_name
from subquad.mixers.contract import MixerOutput, Pattern, RecurrentMixer, Request, keep_mask, silence
from subquad.ops import FlowState, flow_attention
from subquad.ops.flow.api import empty_flow_state

FEATURES = {"sigmoid": torch.sigmoid, "relu": lambda x: torch.relu(x) + 1e-6}


class FlowAttention(RecurrentMixer):
    """Linear attention on positive features whose keys compete for flow and whose queries get a share of it.

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`.
        feature_map: ``"sigmoid"``, or ``"relu"`` (plus 1e-6) as in the paper's long-range experiments.
        clip: bound of the competition's exponent; None: 10 if causal, else none. See
            :func:`subquad.ops.flow_attention`.
        temperature: of the competition.
        bias: of the projections.
        context_dim: width of the context in cross-attention; None is D.

    There is no causal form over a context: sums over queries would show it the later ones. The queries of a call that
    is not causal belong together.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.FULL_SELF, Pattern.FULL_CROSS})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        feature_map: str = "sigmoid",
        clip: float | None = None,
        temperature: float = 1.0,
        bias: bool = True,
        context_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if feature_map not in FEATURES:
            raise unknown_name("feature map of flow attention", feature_map, FEATURES)
        self.head_dim = self.head_width(dim)
        self.phi, self.clip, self.temperature = FEATURES[feature_map], clip, temperature
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(context_dim or dim, dim, bias=bias)
        self.v_proj = nn.Linear(context_dim or dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if self.causal:
            return super().mix(x, context, request)
        q, k, v = self._project(x, x if context is None else context)
        o, _ = flow_attention(
            q,
            k,
            v,
            causal=False,
            clip=self.clip,
            temperature=self.temperature,
            mask=request.mask,
            query_mask=request.mask if context is None else None,
            cu_seqlens=request.cu_seqlens,
        )
        output = self.o_proj(o.flatten(-2))
        if context is None:
            (output,) = silence(request.mask, output)
        return MixerOutput(output, None, {})

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, FlowState]:
        q, k, v = self._project(x, x)
        o, state = flow_attention(
            q,
            k,
            v,
            clip=self.clip,
            temperature=self.temperature,
            mask=keep_mask(x, lengths),
            initial_state=request.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        output: Tensor = self.o_proj(o.flatten(-2))
        return output, state  # type: ignore[return-value]

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.phi(self.q_proj(x)).unflatten(-1, (-1, self.head_dim))
        k = self.phi(self.k_proj(source)).unflatten(-1, (-1, self.head_dim))
        return q, k, self.v_proj(source).unflatten(-1, (-1, self.head_dim))

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> FlowState:
        return empty_flow_state(batch, self.num_heads, self.head_dim, self.head_dim, device)
