"""Softmax attention as a mixer, with rotary positions, grouped heads, windows and query-key norms."""

from typing import cast

import torch
from torch import Tensor, nn

from subquad.kernels.packing import locate
from subquad.layers.norms import build_norm
from subquad.mixers.contract import Mixer, MixerOutput, Pattern, Request
from subquad.ops import SoftmaxState, softmax_attention
from subquad.positions.rope import apply_rope


class SoftmaxAttention(Mixer):
    """Multi-head softmax attention (Vaswani et al. 2017, section 3.2).

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`.
        num_key_value_heads: G, heads of keys and values, a divisor of H; None is H (Ainslie et al. 2023).
        head_dim: width of a head; None is D / H.
        window_size: a query sees only its last so many keys (causal only); None: all.
        num_sinks: with a window, the first tokens that stay visible (Xiao et al. 2024).
        qk_norm: RMS norm on each head's queries and keys.
        rope_base: base of the rotary embedding; None: no positions.
        bias: of the projections of q, k, v.
        context_dim: width of the context in cross-attention; None is D.

    Example:
        >>> mixer = SoftmaxAttention(16, 4, num_key_value_heads=2)
        >>> mixer(torch.zeros(2, 5, 16)).output.shape
        torch.Size([2, 5, 16])
    """

    patterns = frozenset(Pattern)
    uses_positions = True
    constant_state = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int | None = None,
        num_sinks: int = 0,
        qk_norm: bool = False,
        rope_base: float | None = 10_000.0,
        bias: bool = False,
        context_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if self.num_key_value_heads < 1 or num_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads must divide num_heads {num_heads}; got {self.num_key_value_heads}")
        if window_size is not None and (not causal or window_size < 1):
            raise ValueError(f"window_size must be at least 1 and needs causal=True; got {window_size}")
        if num_sinks < 0 or (num_sinks and window_size is None):
            raise ValueError(f"num_sinks must be at least 0 and needs a window_size; got {num_sinks}")
        self.head_dim = head_dim or self.head_width(dim)
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width; it is {self.head_dim}")
        self.window_size, self.num_sinks, self.rope_base = window_size, num_sinks, rope_base
        self.constant_state = window_size is not None  # type: ignore[misc]
        if window_size is not None:  # a prefix is seen whole, and a window is not
            self.patterns = type(self).patterns - {Pattern.PREFIX_SELF}  # type: ignore[misc]
        context_dim = context_dim or dim
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.q_norm = build_norm("rms" if qk_norm else "none", self.head_dim)
        self.k_norm = build_norm("rms" if qk_norm else "none", self.head_dim)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        source = x if context is None else context
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(source).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(source).unflatten(-1, (-1, self.head_dim))
        if self.rope_base is not None and context is None:
            positions = self._positions(x, request)
            q, k = apply_rope(q, positions, self.rope_base), apply_rope(k, positions, self.rope_base)
        causal = self.causal and context is None  # a context is seen whole, also by a causal mixer
        output, state = cast(
            tuple[Tensor, SoftmaxState | None],
            softmax_attention(
                q,
                k,
                v,
                causal=causal,
                mask=request.mask,
                prefix_lengths=request.prefix_lengths,
                window_size=self.window_size if causal else None,
                num_sinks=self.num_sinks if causal else 0,
                initial_state=request.state if causal else None,
                return_state=request.use_state and causal,
                cu_seqlens=request.cu_seqlens,
            ),
        )
        output = self.o_proj(output.flatten(-2))
        if not causal and context is None and request.mask is not None:
            output = output.where(request.mask[..., None], 0)
        if context is not None:
            state = request.state  # the context does not change: whoever holds it may keep its keys elsewhere
        return MixerOutput(output, state if request.use_state else None, {})

    def _positions(self, x: Tensor, request: Request) -> Tensor:
        if request.positions is not None:
            return request.positions
        if request.cu_seqlens is not None:
            sequence, place, sizes = locate(request.cu_seqlens, x.shape[1])
            return (place + self._seen(request.state, len(sizes), x)[sequence])[None]
        time = torch.arange(x.shape[1], device=x.device)
        counted = time.expand(x.shape[0], -1) if request.mask is None else (request.mask.cumsum(1) - 1).clamp(min=0)
        return counted + self._seen(request.state, x.shape[0], x)[:, None]

    @staticmethod
    def _seen(state: SoftmaxState | None, rows: int, x: Tensor) -> Tensor:
        if state is None or not state.positions.shape[1]:
            return torch.zeros(rows, dtype=torch.int64, device=x.device)
        return state.positions.amax(dim=1) + 1

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> SoftmaxState:
        keys = torch.zeros(batch, 0, self.num_key_value_heads, self.head_dim, dtype=dtype, device=device)
        return SoftmaxState(keys, keys.clone(), torch.zeros(batch, 0, dtype=torch.int64, device=device))
