"""Attention from given queries, keys and values, with a state: what a mixer and a converted layer have in common.

A mixer owns its projections; a layer converted from a pretrained model uses those it finds. What lies between the
projections is an :class:`AttentionCore`. Padding is taken off its hands: rows with padding are run as packed sequences.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.layers.feature_attention import build_feature_map
from subquad.layers.norms import build_norm
from subquad.mixers.contract import Mixer, MixerOutput, Pattern, Request, State, count_tokens
from subquad.ops import SoftmaxState, softmax_attention
from subquad.positions.rope import apply_rope


class Heads(NamedTuple):
    """Queries, keys and values of one layer, as they are and turned by their positions; H is a multiple of G."""

    q: Tensor  # (B, T, H, K), after any norm, before positions
    k: Tensor  # (B, T, G, K)
    v: Tensor  # (B, T, G, V)
    q_turned: Tensor  # (B, T, H, K); q itself where positions are not in the attention
    k_turned: Tensor  # (B, T, G, K)
    scale: float  # of softmax's scores

    def map(self, function: Any) -> "Heads":
        """With ``function`` applied to each tensor; what is one tensor stays one."""
        q, k, v = (function(x) for x in (self.q, self.k, self.v))
        q_turned = q if self.q_turned is self.q else function(self.q_turned)
        k_turned = k if self.k_turned is self.k else function(self.k_turned)
        return Heads(q, k, v, q_turned, k_turned, self.scale)


class AttentionCore(nn.Module):
    """Attention between the projections of a layer: ``Heads -> (B, T, H, V)`` and a state.

    Attributes:
        causal: whether token t depends on tokens up to t only.
        constant_state: whether the state does not grow with the context.
    """

    causal = True
    constant_state = True

    def forward(
        self,
        heads: Heads,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        use_state: bool = False,
    ) -> tuple[Tensor, State | None]:
        """The output ``(B, T, H, V)`` and the state after the last token, None unless asked for.

        Args:
            heads: queries, keys, values.
            mask: ``(B, T)`` bool, True = a real token. Padding changes nothing, and its own output is zero.
            cu_seqlens: ``(N + 1,)``, N packed sequences in a batch of one.
            state: of the tokens before.
            use_state: whether to return the next one.
        """
        if mask is None or not self.causal:
            return self.attend(heads, mask, cu_seqlens, state, use_state)
        batch, time, num_heads = heads.q.shape[:3]
        real = mask.flatten().nonzero().flatten()
        if not len(real):
            kept = self.init_state(heads, batch) if state is None else state
            return heads.v.new_zeros(batch, time, num_heads, heads.v.shape[3]), kept if use_state else None
        bounds = F.pad(mask.sum(1).cumsum(0), (1, 0))
        output, state = self.attend(heads.map(lambda x: x.flatten(0, 1)[real][None]), None, bounds, state, use_state)
        padded = output.new_zeros(batch * time, *output.shape[2:]).index_copy(0, real, output[0])
        return padded.unflatten(0, (batch, time)), state

    def attend(
        self, heads: Heads, mask: Tensor | None, cu_seqlens: Tensor | None, state: State | None, use_state: bool
    ) -> tuple[Tensor, State | None]:
        """What a core defines; ``mask`` comes only to cores that are not causal."""
        raise NotImplementedError(f"{type(self).__name__} must define attend")

    def init_state(self, heads: Heads, batch: int) -> State:
        """The state before any token, for rows with the widths and dtype of ``heads``."""
        raise NotImplementedError(f"{type(self).__name__} keeps no state")


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Grouped heads ``(B, T, G, ...)`` as ``(B, T, H, ...)``: each serves H / G queries' heads."""
    groups = heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def empty_window(heads: Heads, batch: int) -> SoftmaxState:
    """The state of a window of softmax attention before any token."""
    keys, values = (x.new_zeros(batch, 0, *x.shape[2:]) for x in (heads.k, heads.v))
    return SoftmaxState(keys, values, torch.zeros(batch, 0, dtype=torch.int64, device=keys.device))


class SoftmaxCore(AttentionCore):
    """Softmax attention, whole or over a window: what a conversion is measured against.

    Args:
        window: tokens that a query sees, itself included; None: all before it.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be an integer >= 1 or None; got {window!r}")
        self.window, self.constant_state = window, window is not None

    def attend(
        self, heads: Heads, mask: Tensor | None, cu_seqlens: Tensor | None, state: State | None, use_state: bool
    ) -> tuple[Tensor, State | None]:
        return cast(
            tuple[Tensor, State | None],
            softmax_attention(
                heads.q_turned,
                heads.k_turned,
                heads.v,
                window_size=self.window,
                scale=heads.scale,
                initial_state=state,
                return_state=use_state,
                cu_seqlens=cu_seqlens,
            ),
        )

    def init_state(self, heads: Heads, batch: int) -> SoftmaxState:
        return empty_window(heads, batch)


class FeatureMapCore(AttentionCore):
    """Linear attention ``o_t = sum_j phi(q_t) . phi(k_j) v_j / sum_j phi(q_t) . phi(k_j)``, with positions applied.

    Args:
        num_heads, head_dim: H, K.
        feature_map: phi by name, see :func:`subquad.layers.feature_attention.build_feature_map`.
        causal: whether token t sees tokens up to t only.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_map: str, *, causal: bool = True) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.phi = build_feature_map(feature_map, num_heads, head_dim)
        if not self.phi.non_negative:
            raise ValueError(
                f"weights are divided by their sum, so the feature map must not be negative (elu+1, relu, "
                f"hedgehog_softmax, ...); got {feature_map!r}"
            )

    def attend(
        self, heads: Heads, mask: Tensor | None, cu_seqlens: Tensor | None, state: State | None, use_state: bool
    ) -> tuple[Tensor, State | None]:
        output, after = self.phi.attend(
            heads.q_turned,
            repeat_heads(heads.k_turned, self.num_heads),
            repeat_heads(heads.v, self.num_heads),
            causal=self.causal,
            mask=mask,
            initial_state=state,
            return_state=use_state,
            cu_seqlens=cu_seqlens,
        )
        return output, after

    def init_state(self, heads: Heads, batch: int) -> State:
        return self.phi.init_state(batch, heads.v.shape[3], True, heads.v.device)


class CoreState(NamedTuple):
    """The state of a core, and how many tokens its mixer has seen: positions count on from there."""

    core: State
    seen: Tensor  # (B,) int64


class CoreAttention(Mixer):
    """Projections with rotary positions, grouped heads and query-key norms around an :class:`AttentionCore`.

    Args:
        dim, num_heads, causal, layer_index, num_layers: see :class:`Mixer`.
        core: what lies between the projections.
        num_key_value_heads: G, heads of keys and values, a divisor of H; None is H.
        head_dim: width of a head; None is D / H.
        qk_norm: RMS norm on each head's queries and keys.
        rope_base: base of the rotary embedding; None: no positions.
        bias: of the projections of q, k, v.
    """

    patterns = frozenset({Pattern.CAUSAL_SELF})
    uses_positions = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        core: AttentionCore,
        *,
        causal: bool,
        num_key_value_heads: int | None,
        head_dim: int | None,
        qk_norm: bool,
        rope_base: float | None,
        bias: bool,
        layer_index: int,
        num_layers: int,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        self.num_key_value_heads = key_value_heads(num_heads, num_key_value_heads)
        self.head_dim, self.rope_base, self.core = head_dim or self.head_width(dim), rope_base, core
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width; it is {self.head_dim}")
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.q_norm = build_norm("rms" if qk_norm else "none", self.head_dim)
        self.k_norm = build_norm("rms" if qk_norm else "none", self.head_dim)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        past: CoreState | None = request.state
        positions, seen = self._positions(x, request, None if past is None else past.seen)
        output, state = self.core(
            self._heads(x, positions),
            mask=request.mask,
            cu_seqlens=request.cu_seqlens,
            state=None if past is None else past.core,
            use_state=request.use_state,
        )
        output = self.o_proj(output.flatten(-2))
        return MixerOutput(output, CoreState(state, seen) if request.use_state else None, {})

    def _heads(self, x: Tensor, positions: Tensor) -> Heads:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.rope_base is None:
            return Heads(q, k, v, q, k, self.head_dim**-0.5)
        q_turned, k_turned = (apply_rope(t, positions, self.rope_base) for t in (q, k))
        return Heads(q, k, v, q_turned, k_turned, self.head_dim**-0.5)

    @staticmethod
    def _positions(x: Tensor, request: Request, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        if request.mask is None:
            return count_tokens(x, None, request, seen)
        counted, after = count_tokens(x, request.mask.sum(1), request, seen)
        if request.positions is not None:
            return counted, after
        places = (request.mask.cumsum(1) - 1).clamp(min=0)
        return places if seen is None else places + seen[:, None], after

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> CoreState:
        q, k = (
            torch.zeros(batch, 1, heads, self.head_dim, dtype=dtype, device=device)
            for heads in (self.num_heads, self.num_key_value_heads)
        )
        state = self.core.init_state(Heads(q, k, k, q, k, 1.0), batch)
        return CoreState(state, torch.zeros(batch, dtype=torch.int64, device=device))


def key_value_heads(num_heads: int, num_key_value_heads: int | None) -> int:
    """The number of heads of keys and values, checked; None is that of the queries."""
    heads = num_heads if num_key_value_heads is None else num_key_value_heads
    if heads < 1 or num_heads % heads:
        raise ValueError(f"num_key_value_heads must divide num_heads {num_heads}; got {heads}")
    return heads
