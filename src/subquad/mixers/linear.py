"""Linear attention as a mixer: a feature map, no decay (Katharopoulos et al. 2020, section 3)."""

from typing import Any

import torch
from torch import Tensor, nn

from subquad.layers.feature_attention import build_feature_map
from subquad.layers.norms import build_norm
from subquad.mixers.contract import MatrixState, MixerOutput, Pattern, RecurrentMixer, Request, keep_mask, silence


class LinearAttention(RecurrentMixer):
    """``o_t = sum_j phi(q_t) . phi(k_j) v_j``, divided by the sum of its weights or normed after it.

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`.
        feature_map: phi by name, without weights (``"elu+1"``, the paper's; ``"taylor"``) or with
            (``"hedgehog_softmax"``, ``"t2r"``); see :func:`subquad.layers.feature_attention.build_feature_map`.
        normalize: divide by ``sum_j phi(q_t) . phi(k_j)`` (weights must not be negative).
        output_norm: norm on each head's output, by name; ``"none"`` with ``normalize``, as in the paper.
        feature_dim: width of a query or key in each head, before the map; None is D / H.
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
        feature_dim: int | None = None,
        context_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_dim = self.head_width(dim)
        self.feature_dim = self.head_dim if feature_dim is None else feature_dim
        if self.feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1; got {feature_dim}")
        self.phi, self.normalize = build_feature_map(feature_map, num_heads, self.feature_dim), normalize
        if normalize and not self.phi.non_negative:
            raise ValueError(
                f"normalize=True divides by a sum of weights, so the feature map must not be negative "
                f"(elu+1, relu, softmax, ...); got {feature_map!r}"
            )
        width = num_heads * self.feature_dim
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(context_dim or dim, width, bias=False)
        self.v_proj = nn.Linear(context_dim or dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.o_norm = build_norm(output_norm, self.head_dim)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if self.causal and context is None:
            return super().mix(x, context, request)
        q, k, v = self.project(x, x if context is None else context)
        o, _ = self.phi.attend(
            q, k, v, causal=False, normalize=self.normalize, mask=request.mask, cu_seqlens=request.cu_seqlens
        )
        output = self.o_proj(self.o_norm(o).flatten(-2))
        if context is None:
            (output,) = silence(request.mask, output)
        return MixerOutput(output, request.state if request.use_state else None, {})

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, Any]:
        past = request.state
        o, state = self.phi.attend(
            *self.project(x, x),
            normalize=self.normalize,
            mask=keep_mask(x, lengths),
            initial_state=past.state if isinstance(past, MatrixState) else past,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )
        output: Tensor = self.o_proj(self.o_norm(o).flatten(-2))
        return output, MatrixState(state) if isinstance(state, Tensor) else state

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of ``source``, in heads; the feature map is not applied yet."""
        q = self.q_proj(x).unflatten(-1, (-1, self.feature_dim))
        k = self.k_proj(source).unflatten(-1, (-1, self.feature_dim))
        return q, k, self.v_proj(source).unflatten(-1, (-1, self.head_dim))

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        state = self.phi.init_state(batch, self.head_dim, self.normalize, device)
        return MatrixState(state) if isinstance(state, Tensor) else state
