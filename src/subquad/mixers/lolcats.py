"""LoLCATs attention (Zhang et al. 2025): softmax over a window, learnt linear attention over all before it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from subquad.layers.feature_attention import T2R, Hedgehog, LearnedMap
from subquad.layers.registry import unknown_name
from subquad.mixers.contract import State, wide
from subquad.mixers.cores import AttentionCore, CoreAttention, Heads, key_value_heads, repeat_heads
from subquad.ops import (
    NormalizedState,
    SlidingLinearState,
    linear_attention,
    sliding_linear_attention,
    terraced_linear_attention,
)

FORMS = {"sliding": sliding_linear_attention, "terraced": terraced_linear_attention}
FEATURE_MAPS: dict[str, Callable[..., LearnedMap]] = {
    "hedgehog_softmax": partial(Hedgehog, form="softmax"),
    "hedgehog_joint": partial(Hedgehog, form="joint"),
    "t2r": T2R,
}
FIRST_MIX = 0.1  # weight of the window at the start


class LolcatsCore(AttentionCore):
    """Softmax over the window and linear attention before it, under one normaliser, with positions applied.

    Features are ``[softmax(W x), softmax(-W x)]`` with a W per head for queries and one for keys, at first the
    identity, cut to ``feature_dim`` rows; the window weighs ``sigmoid(gamma)`` per head, at first 0.1. New parameters
    are float32 whatever the model is.

    Args:
        num_heads, num_key_value_heads, head_dim: H, G, K.
        window: w; None: linear attention alone.
        form: ``"sliding"`` or ``"terraced"``, see :func:`subquad.ops.sliding_linear_attention`.
        feature_dim: rows of W.
        feature_map: ``"hedgehog_softmax"``, ``"hedgehog_joint"`` or ``"t2r"``.
        share_kv_maps: one map of keys, and one state, for each head of keys and values, not for each query's head.
        affine: weigh the linear part by ``1 - sigmoid(gamma)``; else by 1.
    """

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        window: int | None = 64,
        form: str = "sliding",
        feature_dim: int = 64,
        feature_map: str = "hedgehog_softmax",
        share_kv_maps: bool = False,
        affine: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise unknown_name("form of LoLCATs", form, FORMS)
        if feature_map not in FEATURE_MAPS:
            raise unknown_name("feature map of LoLCATs", feature_map, FEATURE_MAPS)
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be an integer >= 1, or None for linear attention alone; got {window!r}")
        if not isinstance(feature_dim, int) or feature_dim < 1:
            raise ValueError(f"feature_dim must be an integer >= 1; got {feature_dim!r}")
        if affine and window is None:
            raise ValueError("affine weighs a window against the rest: it needs a window")
        self.num_heads, self.window, self.form, self.affine = num_heads, window, form, affine
        self.key_heads = num_key_value_heads if share_kv_maps else num_heads
        self.phi: LearnedMap = FEATURE_MAPS[feature_map](
            num_heads, head_dim, outputs=feature_dim, bias=feature_map == "t2r", key_heads=self.key_heads
        )
        if window is not None:
            self.gamma = nn.Parameter(torch.empty(num_heads))
            self.gamma._no_weight_decay = True  # type: ignore[attr-defined]
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The window's weight as at the start; feature maps reset themselves."""
        if self.window is not None:
            self.gamma.fill_(math.log(FIRST_MIX / (1 - FIRST_MIX)))

    def attend(
        self, heads: Heads, mask: Tensor | None, cu_seqlens: Tensor | None, state: State | None, use_state: bool
    ) -> tuple[Tensor, Any]:
        key = repeat_heads(heads.k_turned, self.key_heads)
        phi_q, phi_k = self.phi.query(heads.q_turned), self.phi.key(key)
        shared: dict[str, Any] = {"initial_state": state, "return_state": use_state, "cu_seqlens": cu_seqlens}
        if self.window is None:
            phi_k, v = (repeat_heads(x, self.num_heads) for x in (phi_k, heads.v))
            return linear_attention(phi_q, phi_k, v, normalize=True, **shared)
        mix = wide(self.gamma).sigmoid()
        if self.affine:
            phi_q = phi_q * (1 - mix)[:, None].to(phi_q.dtype)
        return FORMS[self.form](
            heads.q_turned,
            heads.k_turned,
            heads.v,
            phi_q,
            phi_k,
            mix,
            window=self.window,
            scale=heads.scale,
            **shared,
        )

    def init_state(self, heads: Heads, batch: int) -> NormalizedState | SlidingLinearState:
        width, columns, device = self.phi.width, heads.v.shape[3], heads.v.device
        groups = self.num_heads if self.window is None else self.key_heads
        sums = torch.zeros(batch, groups, width, columns, device=device)
        if self.window is None:
            return NormalizedState(sums, sums[..., 0].clone())
        slots = (self.window if self.form == "sliding" else 2 * self.window) - 1
        return SlidingLinearState(
            heads.k.new_zeros(batch, slots, *heads.k.shape[2:]),
            heads.v.new_zeros(batch, slots, *heads.v.shape[2:]),
            heads.k.new_zeros(batch, slots, groups, width),
            sums,
            sums[..., 0].clone(),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def extra_repr(self) -> str:
        return f"{self.form}, window {self.window}"


class LolcatsAttention(CoreAttention):
    """Attention whose far past is linear attention with learnt feature maps: ``y = W_o o``, see :class:`LolcatsCore`.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        num_key_value_heads, head_dim, qk_norm, rope_base, bias: see :class:`CoreAttention`.
        window, form, feature_dim, feature_map, share_kv_maps, affine: see :class:`LolcatsCore`; ``feature_dim`` None
            is the width of a head.

    Example:
        >>> mixer = LolcatsAttention(16, 4, num_key_value_heads=2, window=3)
        >>> mixer(torch.zeros(2, 5, 16)).output.shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = 64,
        form: str = "sliding",
        feature_dim: int | None = None,
        feature_map: str = "hedgehog_softmax",
        share_kv_maps: bool = False,
        affine: bool = False,
        qk_norm: bool = False,
        rope_base: float | None = 10_000.0,
        bias: bool = False,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        width = head_dim or dim // num_heads
        core = LolcatsCore(
            num_heads,
            key_value_heads(num_heads, num_key_value_heads),
            width,
            window=window,
            form=form,
            feature_dim=width if feature_dim is None else feature_dim,
            feature_map=feature_map,
            share_kv_maps=share_kv_maps,
            affine=affine,
        )
        super().__init__(
            dim,
            num_heads,
            core,
            causal=causal,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            rope_base=rope_base,
            bias=bias,
            layer_index=layer_index,
            num_layers=num_layers,
        )
