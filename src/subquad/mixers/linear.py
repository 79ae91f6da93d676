"""Linear attention as a mixer: a feature map, no decay (Katharopoulos et al. 2020, section 3)."""

import torch
from torch import Tensor, nn

from subquad.layers.feature_maps import NON_NEGATIVE
from subquad.layers.feature_maps import feature_map as get_feature_map
from subquad.layers.norms import build_norm
from subquad.mixers.contract import MatrixState, MixerOutput, Pattern, RecurrentMixer, Request, keep_mask, silence
from subquad.ops import NormalizedState, linear_attention


class LinearAttention(RecurrentMixer):
    """``o_t = sum_j phi(q_t) . phi(k_j) v_j``, divided by the sum of its weights or normed after it.

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`.
        feature_map: phi by name; ``"elu+1"`` is the paper's.
        normalize: divide by ``sum_j phi(q_t) . phi(k_j)`` (phi must not be negative).
        output_norm: norm on each head's output, by name; ``"none"`` with ``normalize``, as in the paper.
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
        normalize: bool = True,
        output_norm: str = "none",
        context_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_dim = self.head_width(dim)
        if normalize and feature_map not in NON_NEGATIVE:
            raise ValueError(
                f"normalize=True divides by a sum of weights, so the feature map must not be negative: "
                f"{', '.join(sorted(NON_NEGATIVE))}; got {feature_map!r}"
            )
        self.phi, self.normalize = get_feature_map(feature_map), normalize
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(context_dim or dim, dim, bias=False)
        self.v_proj = nn.Linear(context_dim or dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.o_norm = build_norm(output_norm, self.head_dim)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if self.causal and context is None:
            return super().mix(x, context, request)
        source = x if context is None else context
        q, k, v = self._project(x, source)
        k, v = silence(request.mask, k, v)
        o, _ = linear_attention(q, k, v, causal=False, normalize=self.normalize, cu_seqlens=request.cu_seqlens)
        output = self.o_proj(self.o_norm(o).flatten(-2))
        if context is None:
            (output,) = silence(request.mask, output)
        return MixerOutput(output, request.state if request.use_state else None, {})

    def recur(
        self, x: Tensor, lengths: Tensor | None, request: Request
    ) -> tuple[Tensor, MatrixState | NormalizedState]:
        q, k, v = self._project(x, x)
        k, v = silence(keep_mask(x, lengths), k, v)
        past = request.state
        o, state = linear_attention(
            q,
            k,
            v,
            normalize=self.normalize,
            initial_state=None if past is None else past if self.normalize else past.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        output: Tensor = self.o_proj(self.o_norm(o).flatten(-2))
        return output, state if self.normalize else MatrixState(state)  # type: ignore[arg-type, return-value]

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.phi(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.phi(self.k_proj(source).unflatten(-1, (-1, self.head_dim)))
        return q, k, self.v_proj(source).unflatten(-1, (-1, self.head_dim))

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> MatrixState | NormalizedState:
        state = torch.zeros(batch, self.num_heads, self.head_dim, self.head_dim, device=device)
        if not self.normalize:
            return MatrixState(state)
        return NormalizedState(state, state[..., 0].clone())
