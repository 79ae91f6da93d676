"""Prefix linear attention as a mixer (Arora et al. 2024b, "Just read twice", section 4)."""

from typing import Any

import torch
from torch import Tensor, nn

from subquad.kernels.packing import locate
from subquad.layers.feature_attention import ExponentialMap, Taylor, build_feature_map
from subquad.mixers.contract import MixerOutput, Pattern, RecurrentMixer, Request, keep_mask
from subquad.ops import prefix_linear_attention


class PrefixLinearAttention(RecurrentMixer):
    """Linear attention in which every token also sees the whole prefix, through keys and values of its own.

    What is kept of the prefix can so depend on what comes after it, at the cost and the state of the causal layer. With
    no prefix it is causal; with ``causal=False`` every row is its own prefix. The prefix belongs to the beginning of a
    sequence: calls that go on from a state take none, and the prefix is read in one call.

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`; the paper uses 16 heads.
        feature_map: by name, see :func:`subquad.layers.feature_attention.build_feature_map`; the paper's is the Taylor
            series. Maps that are exponentials are not served.
        feature_dim: width of a query or key in each head, before the map; None is D / H.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF, Pattern.FULL_SELF, Pattern.PREFIX_SELF})

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        *,
        causal: bool = True,
        feature_map: str = "taylor",
        feature_dim: int | None = 16,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.head_dim = self.head_width(dim)
        self.feature_dim = self.head_dim if feature_dim is None else feature_dim
        self.phi = build_feature_map(feature_map, num_heads, self.feature_dim)
        if isinstance(self.phi, ExponentialMap) or not self.phi.non_negative:
            raise ValueError(
                f"the feature map of a prefix must not be negative, nor an exponential whose scale runs with tokens: "
                f"taylor, elu+1, relu, hedgehog_softmax, ...; got {feature_map!r}"
            )
        width = num_heads * self.feature_dim
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, width, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.prefix_k_proj = nn.Linear(dim, width, bias=False)
        self.prefix_v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        if request.state is not None and request.prefix_lengths is not None:
            raise ValueError("a prefix is where a sequence begins: a call that goes on from a state takes none")
        return super().mix(x, context, request)

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, Any]:
        keep = keep_mask(x, lengths)
        q = self.q_proj(x).unflatten(-1, (-1, self.feature_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.feature_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        prefix = request.prefix_lengths if self.causal else self._whole(x, lengths, request)
        if prefix is None:
            o, state = self.phi.attend(
                q,
                k,
                v,
                mask=keep,
                initial_state=request.state,
                return_state=request.use_state,
                cu_seqlens=request.cu_seqlens,
            )
        else:
            if lengths is not None and bool((prefix > lengths).any()):
                raise ValueError(
                    f"prefix_lengths count real tokens, of which rows have {lengths.tolist()}; got {prefix.tolist()}"
                )
            prefix_k = self.prefix_k_proj(x).unflatten(-1, (-1, self.feature_dim))
            prefix_v = self.prefix_v_proj(x).unflatten(-1, (-1, self.head_dim))
            features = "taylor" if isinstance(self.phi, Taylor) else "identity"
            if features == "identity":
                q, k, prefix_k = self.phi.query(q), self.phi.key(k), self.phi.key(prefix_k)
            o, state = prefix_linear_attention(
                q,
                k,
                v,
                prefix_k,
                prefix_v,
                prefix_lengths=prefix,
                features=features,
                mask=keep,
                return_state=request.use_state,
                cu_seqlens=request.cu_seqlens,
            )
        output: Tensor = self.o_proj(o.flatten(-2))
        return output, state

    @staticmethod
    def _whole(x: Tensor, lengths: Tensor | None, request: Request) -> Tensor:
        """The length of each row or packed sequence: the prefix of a layer that is not causal."""
        if request.cu_seqlens is not None:
            return locate(request.cu_seqlens, x.shape[1]).sizes
        return torch.full((x.shape[0],), x.shape[1], device=x.device) if lengths is None else lengths

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        return self.phi.init_state(batch, self.head_dim, True, device)
