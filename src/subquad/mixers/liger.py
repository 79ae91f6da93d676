"""Liger attention (Lan et al. 2025): a gated recurrence whose gate is the key, and a softmax window on the same heads.

No parameter beyond the projections of attention: a pretrained Transformer has them all (:mod:`subquad.convert`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.layers.registry import unknown_name
from subquad.mixers.contract import State, wide
from subquad.mixers.cores import AttentionCore, CoreAttention, Heads, empty_window, key_value_heads, repeat_heads
from subquad.ops import SoftmaxState, gla, softmax_attention

GATE_TEMPERATURE = 16  # log g = logsigmoid(a) / 16, as in gated linear attention
SLOTS = 128  # of the slot recurrence, as published; fewer where the head is narrower


class LigerState(NamedTuple):
    """The recurrence's matrices, and the keys and values of the window; None for a branch that has no weight."""

    state: Tensor | None  # (B, H, K, V) float32; of slots (B, H, K, m)
    slots: Tensor | None  # (B, H, m, V) float32, of the slot recurrence
    window: SoftmaxState | None


class LigerCore(AttentionCore):
    """``o = alpha o_recurrent + beta o_window`` from the same queries, keys and values (section 3).

    The recurrent branch reads q and k before positions and has scale 1; a is the gate's logit.

    - ``"gla"``: ``log g = logsigmoid(a) / 16``, ``S_t = diag(g_t) S_{t-1} + softmax(k_t) v_t^T``,
      ``o_t = S_t^T softmax(q_t)``;
    - ``"hgrn2"``: ``log g = logsigmoid(a)``, keys ``1 - g``, queries ``softmax(q)``;
    - ``"gsa"``: m slots, ``log g = logsigmoid(a) / 16``, ``K_t = diag(g) K_{t-1} + (1 - g) k_t^T`` and so V,
      ``o_t = V_t^T softmax(K_t q_t)``.

    Args:
        num_heads: H.
        head_dim: K, the width of a query and key.
        recurrence: one of the three.
        window: keys that the softmax branch sees, the query's own included.
        mix: alpha and beta; a branch with weight 0 is left out.
        gate: ``"key"``: a is k (for slots the mean of each K / m channels); ``"scalar"``: the mean of k over its
            channels; ``"none"``: no forgetting.
        num_slots: m, a divisor of K; None is 128, or K where K is less.
        learn_mix: alpha and beta are parameters per head, which begin as given.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        recurrence: str = "gla",
        window: int = 64,
        mix: Sequence[float] = (0.5, 0.5),
        gate: str = "key",
        num_slots: int | None = None,
        learn_mix: bool = False,
    ) -> None:
        super().__init__()
        if recurrence not in RECURRENCES:
            raise unknown_name("recurrence of Liger", recurrence, RECURRENCES)
        if gate not in ("key", "scalar", "none"):
            raise unknown_name("gate of Liger", gate, ("key", "scalar", "none"))
        if gate == "none" and recurrence != "gla":
            raise ValueError(f"gate 'none' belongs to recurrence 'gla': {recurrence!r} writes with 1 - g, here zero")
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be an integer >= 1; got {window!r}")
        if len(tuple(mix)) != 2 or not any(mix):
            raise ValueError(f"mix must be two weights, of the recurrence and the window, not both 0; got {mix!r}")
        slots = min(SLOTS, head_dim) if num_slots is None else num_slots
        if recurrence != "gsa" and num_slots is not None:
            raise ValueError(f"num_slots belongs to recurrence 'gsa'; the recurrence is {recurrence!r}")
        if recurrence == "gsa" and (slots < 1 or head_dim % slots):
            raise ValueError(f"num_slots must divide the head width {head_dim}; got {slots}")
        self.num_heads, self.head_dim, self.recurrence, self.window = num_heads, head_dim, recurrence, window
        self.gate, self.num_slots, self.learn_mix = gate, slots, learn_mix
        self.mix = (float(mix[0]), float(mix[1]))
        if learn_mix:
            self.mix_weights = nn.Parameter(torch.empty(2, num_heads))
            self.mix_weights._no_weight_decay = True  # type: ignore[attr-defined]
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights of the branches as they were given."""
        if self.learn_mix:
            self.mix_weights.copy_(torch.tensor(self.mix, device=self.mix_weights.device)[:, None].expand(2, -1))

    def attend(
        self, heads: Heads, mask: Tensor | None, cu_seqlens: Tensor | None, state: State | None, use_state: bool
    ) -> tuple[Tensor, LigerState | None]:
        past = LigerState(None, None, None) if state is None else cast(LigerState, state)
        output: Tensor | None = None
        window: SoftmaxState | None = None
        matrices: Matrices = (None, None)
        alpha, beta = self._weights(heads.v)
        if alpha is not None:
            recurrent, matrices = RECURRENCES[self.recurrence](self, heads, past, cu_seqlens, use_state)
            output = recurrent * alpha
        if beta is not None:
            near, window = cast(
                tuple[Tensor, SoftmaxState | None],
                softmax_attention(
                    heads.q_turned,
                    heads.k_turned,
                    heads.v,
                    window_size=self.window,
                    scale=heads.scale,
                    initial_state=past.window,
                    return_state=use_state,
                    cu_seqlens=cu_seqlens,
                ),
            )
            output = near * beta if output is None else output + near * beta
        assert output is not None
        return output, LigerState(*matrices, window) if use_state else None

    def log_gate(self, k: Tensor) -> Tensor:
        """``logsigmoid(a)``, over 16 but for HGRN2, of keys ``(B, T, G, K)``: one per channel or slot, float32."""
        logit = wide(k)
        if self.recurrence == "gsa":
            logit = logit.unflatten(-1, (self.num_slots, -1)).mean(-1)
        if self.gate == "scalar":
            logit = logit.mean(-1, keepdim=True).expand_as(logit)
        elif self.gate == "none":
            return torch.zeros_like(logit)
        return F.logsigmoid(logit) / (1 if self.recurrence == "hgrn2" else GATE_TEMPERATURE)

    def _weights(self, like: Tensor) -> tuple[Tensor | float | None, Tensor | float | None]:
        if not self.learn_mix:
            return self.mix[0] or None, self.mix[1] or None
        alpha, beta = self.mix_weights.to(like.dtype)[..., None]
        return alpha, beta

    def init_state(self, heads: Heads, batch: int) -> LigerState:
        alpha, beta = self._weights(heads.v)
        size, device = (batch, self.num_heads), heads.v.device
        if alpha is None:
            matrices: Matrices = (None, None)
        elif self.recurrence == "gsa":
            matrices = (
                torch.zeros(*size, self.head_dim, self.num_slots, device=device),
                torch.zeros(*size, self.num_slots, heads.v.shape[3], device=device),
            )
        else:
            matrices = torch.zeros(*size, self.head_dim, heads.v.shape[3], device=device), None
        return LigerState(*matrices, None if beta is None else empty_window(heads, batch))

    def extra_repr(self) -> str:
        return f"{self.recurrence}, window {self.window}, mix {self.mix}, gate {self.gate}"


Matrices = tuple[Tensor | None, Tensor | None]
Recurrence = Callable[[LigerCore, Heads, LigerState, Tensor | None, bool], tuple[Tensor, Matrices]]


def _softmax(x: Tensor) -> Tensor:
    return wide(x).softmax(-1).to(x.dtype)


def _gated(
    core: LigerCore, heads: Heads, past: LigerState, cu_seqlens: Tensor | None, use_state: bool
) -> tuple[Tensor, Matrices]:
    log_gate = core.log_gate(heads.k)
    keys = _softmax(heads.k) if core.recurrence == "gla" else (-torch.expm1(log_gate)).to(heads.k.dtype)
    k, v, log_decay = (repeat_heads(x, core.num_heads) for x in (keys, heads.v, log_gate))
    output, state = gla(
        _softmax(heads.q),
        k,
        v,
        log_decay,
        scale=1.0,
        initial_state=past.state,
        return_state=use_state,
        cu_seqlens=cu_seqlens,
    )
    return output, (state, None)


def _slots(
    core: LigerCore, heads: Heads, past: LigerState, cu_seqlens: Tensor | None, use_state: bool
) -> tuple[Tensor, Matrices]:
    log_gate = core.log_gate(heads.k)
    written = (-torch.expm1(log_gate)).to(heads.k.dtype)
    k, v, log_decay, write = (repeat_heads(x, core.num_heads) for x in (heads.k, heads.v, log_gate, written))
    scores, first = gla(
        heads.q,
        k,
        write,
        value_log_decay=log_decay,
        scale=1.0,
        initial_state=past.state,
        return_state=use_state,
        cu_seqlens=cu_seqlens,
    )
    output, second = gla(
        _softmax(scores),
        write,
        v,
        log_decay,
        scale=1.0,
        initial_state=past.slots,
        return_state=use_state,
        cu_seqlens=cu_seqlens,
    )
    return output, (first, second)


RECURRENCES: dict[str, Recurrence] = {"gla": _gated, "hgrn2": _gated, "gsa": _slots}


class LigerAttention(CoreAttention):
    """Attention whose far past is a gated recurrence on the same projections: ``y = W_o o``, see :class:`LigerCore`.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        num_key_value_heads, head_dim, qk_norm, rope_base, bias: see :class:`CoreAttention`.
        recurrence, window, mix, gate, num_slots, learn_mix: see :class:`LigerCore`.

    Example:
        >>> mixer = LigerAttention(16, 4, num_key_value_heads=2, window=3)
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
        recurrence: str = "gla",
        window: int = 64,
        mix: Sequence[float] = (0.5, 0.5),
        gate: str = "key",
        num_slots: int | None = None,
        learn_mix: bool = False,
        qk_norm: bool = False,
        rope_base: float | None = 10_000.0,
        bias: bool = False,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        key_value_heads(num_heads, num_key_value_heads)
        core = LigerCore(
            num_heads,
            head_dim or dim // num_heads,
            recurrence=recurrence,
            window=window,
            mix=mix,
            gate=gate,
            num_slots=num_slots,
            learn_mix=learn_mix,
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
