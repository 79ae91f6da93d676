"""One token through five mixers in plain torch: each layer's equations on its own weights, without modules or checks.

This is what a careful user writes by hand for decoding one sequence, and what ``mixer_steps`` in ``ops.py`` compares
with. Everything that does not depend on the token is computed outside of the step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor, Any], tuple[Tensor, tuple[Tensor, ...]]]


def _decay_and_read(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """q, k ``(H, K)``, v ``(H, V)``, state ``(H, K, V)`` -> output ``(H, 1, V)`` and the new state."""
    state = torch.addcmul(state * decay, k[:, :, None], v[:, None])
    return torch.bmm(q[:, None], state), state


def _erase_and_read(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The delta rule on a state that has decayed already; beta ``(H, 1, 1)``."""
    update = beta * (v[:, None] - torch.bmm(k[:, None], state))
    state = torch.baddbmm(state, k[:, :, None], update)
    return torch.bmm(q[:, None], state), state


def _convolved(x: Tensor, tail: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """x ``(1, C)``, tail ``(W - 1, C)``, taps ``(W, C)`` -> SiLU of the convolution ``(1, C)`` and the new tail."""
    window = torch.cat([tail, x])
    return F.silu((window * taps).sum(0, keepdim=True)), window[1:]


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def lightning(mixer: Any) -> Step:
    heads, width = mixer.num_heads, mixer.head_dim
    w_q, w_k, w_v, w_o = (p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj))
    low, high, norm = mixer.gate_proj[0].weight, mixer.gate_proj[1].weight, mixer.o_norm
    decay, norm_weight, norm_bias, eps = (-mixer.slope).exp()[:, None, None], norm.weight, norm.bias, norm.eps

    def step(x: Tensor, past: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        q = F.silu(F.linear(x, w_q)).view(heads, width)
        k = F.silu(F.linear(x, w_k)).view(heads, width)
        v = F.silu(F.linear(x, w_v)).view(heads, width)
        o, state = _decay_and_read(q, k, v, decay, past.state[0])
        o = F.layer_norm(o.view(1, -1), (heads * width,), norm_weight, norm_bias, eps)
        return F.linear(o * torch.sigmoid(F.linear(F.linear(x, low), high)), w_o), (state,)

    return step


def retention(mixer: Any) -> Step:
    heads, width, scale = mixer.num_heads, mixer.head_k_dim, mixer.head_k_dim**-0.5
    w_q, w_k, w_v, w_g, w_o = (p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.o_proj))
    decay, norm_weight, eps = (-mixer.slope).exp()[:, None, None], mixer.o_norm.weight, mixer.o_norm.eps
    rates = mixer.rope_base ** (-torch.arange(0, width, 2) / width)

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def step(x: Tensor, past: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        angle = past.seen * rates
        cos, sin = angle.cos(), angle.sin()
        q = turn(F.linear(x, w_q).view(heads, width), cos, sin) * scale
        k = turn(F.linear(x, w_k).view(heads, width), cos, sin)
        v = F.linear(x, w_v).view(heads, -1)
        o, state = _decay_and_read(q, k, v, decay, past.state[0])
        o = F.rms_norm(o.squeeze(1), norm_weight.shape, norm_weight, eps).view(1, -1)
        return F.linear(o * F.silu(F.linear(x, w_g)), w_o), (state, past.seen + 1)

    return step


def gla(mixer: Any) -> Step:
    heads, width, scale = mixer.num_heads, mixer.head_k_dim, mixer.head_k_dim**-0.5
    w_q, w_k, w_v, w_g, w_o = (p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj, mixer.o_proj))
    low, high, bias = mixer.gk_proj[0].weight, mixer.gk_proj[1].weight, mixer.gk_proj[1].bias
    temperature, norm_weight, eps = mixer.gate_temperature, mixer.o_norm.weight, mixer.o_norm.eps

    def step(x: Tensor, past: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        q = F.linear(x, w_q).view(heads, width) * scale
        k = F.linear(x, w_k).view(heads, width)
        v = F.linear(x, w_v).view(heads, -1)
        decay = (F.logsigmoid(F.linear(F.linear(x, low), high, bias)) / temperature).exp().view(heads, width, 1)
        o, state = _decay_and_read(q, k, v, decay, past.state[0])
        o = F.rms_norm(o.squeeze(1), norm_weight.shape, norm_weight, eps).view(1, -1)
        return F.linear(o * F.silu(F.linear(x, w_g)), w_o), (state,)

    return step


def delta_net(mixer: Any) -> Step:
    heads, width, scale = mixer.num_heads, mixer.head_k_dim, mixer.head_k_dim**-0.5
    w_q, w_k, w_v, w_b, w_o = (p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.b_proj, mixer.o_proj))
    taps = [c.weight.t().contiguous() for c in (mixer.convolutions.q, mixer.convolutions.k, mixer.convolutions.v)]
    w_g = None if mixer.g_proj is None else mixer.g_proj.weight
    norm_weight, eps = mixer.o_norm.weight, mixer.o_norm.eps
    forget = getattr(mixer, "gate", None)
    if forget is not None:
        w_a, rate, bias = forget.proj.weight, forget.A_log.exp(), forget.dt_bias

    def step(x: Tensor, past: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, q_tail = _convolved(F.linear(x, w_q), past.tails.q[0], taps[0])
        k, k_tail = _convolved(F.linear(x, w_k), past.tails.k[0], taps[1])
        v, v_tail = _convolved(F.linear(x, w_v), past.tails.v[0], taps[2])
        q, k, v = _unit(q.view(heads, width)) * scale, _unit(k.view(heads, width)), v.view(heads, -1)
        beta = torch.sigmoid(F.linear(x, w_b)).view(heads, 1, 1)
        state = past.state[0]
        if forget is not None:
            state = state * (-rate * F.softplus(F.linear(x, w_a) + bias)).exp().view(heads, 1, 1)
        o, state = _erase_and_read(q, k, v, beta, state)
        o = F.rms_norm(o.squeeze(1), norm_weight.shape, norm_weight, eps).view(1, -1)
        if w_g is not None:
            o = o * F.silu(F.linear(x, w_g))
        return F.linear(o, w_o), (state, q_tail, k_tail, v_tail)

    return step


STEPS: dict[str, Callable[[Any], Step]] = {
    "lightning": lightning,
    "retention": retention,
    "gla": gla,
    "delta_net": delta_net,
    "gated_delta_net": delta_net,
}
