"""Lightning attention as defined: linear attention whose state forgets at a constant rate per head.

Source: Qin et al. 2024, "Various Lengths, Constant Speed", section 3. Retention (Sun et al. 2023): ``scale = K**-0.5``.
"""

import torch
from torch import Tensor


def lightning_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, slope: Tensor, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after another::

    state_t  = exp(-slope) * state_{t-1} + k_t v_t^T
    output_t = scale * state_t^T q_t
    """
    decay = torch.exp(-slope)[:, None, None]
    state, outputs = initial_state, []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1)):
        state = decay * state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_t))
    return torch.stack(outputs, dim=1), state


def lightning_attention_quadratic(q: Tensor, k: Tensor, v: Tensor, *, slope: Tensor, scale: float) -> Tensor:
    """All pairs at once, from an empty state: ``scale * (q k^T * M) v``, ``M_ij = exp(-slope (i - j))``, i >= j."""
    step = torch.arange(q.shape[1], device=q.device)
    distance = step[:, None] - step
    decay = torch.exp(-slope[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
    return scale * torch.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, decay, v)
