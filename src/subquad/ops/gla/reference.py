"""Gated linear attention as defined: a matrix state that forgets by a gate computed from the token.

Source: Yang et al. 2024, "Gated Linear Attention Transformers with Hardware-Efficient Training", eq. 3.
"""

import torch
from torch import Tensor


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    value_log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token after another, a_t = exp(log_decay_t) over keys and b_t = exp(value_log_decay_t) over values::

    state_t  = (a_t b_t^T) * state_{t-1} + k_t v_t^T
    output_t = scale * state_t^T q_t
    """
    decay = torch.ones_like(k) if log_decay is None else log_decay.exp()
    value_decay = torch.ones_like(v) if value_log_decay is None else value_log_decay.exp()
    state, outputs = initial_state, []
    for q_t, k_t, v_t, a_t, b_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), decay.unbind(1), value_decay.unbind(1)):
        state = torch.einsum("bhk,bhv->bhkv", a_t, b_t) * state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_t))
    return torch.stack(outputs, dim=1), state


def simple_gla_reference(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after another, with one gate per head::

    state_t  = exp(log_decay_t) * state_{t-1} + k_t v_t^T
    output_t = scale * state_t^T q_t
    """
    state, outputs = initial_state, []
    for q_t, k_t, v_t, g_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), log_decay.unbind(1)):
        state = g_t.exp()[..., None, None] * state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_t))
    return torch.stack(outputs, dim=1), state
