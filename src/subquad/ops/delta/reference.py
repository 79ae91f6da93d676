"""The delta rule as defined: erase what the state holds under the new key, then write.

Sources: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", eq. 2; gated
form, Yang et al. 2025, eq. 10; one gate per channel, Kimi Team 2025; products, Siems et al. 2025, eq. 6.
"""

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: Tensor,
    scale: float,
    initial_state: Tensor,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after another; without a gate ``decayed_t = state_{t-1}``::

        decayed_t  = diag(exp(log_decay_t)) state_{t-1}
        residual_t = v_t - decayed_t^T k_t
        state_t    = decayed_t + beta_t k_t residual_t^T
        output_t   = scale * state_t^T q_t

    With n updates per token (k, v ``(B, T n, H, .)``) the decay comes before the first and the output after the last.
    """
    updates = k.shape[1] // q.shape[1]
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        if log_decay is not None:
            decay = log_decay[:, t].exp()
            state = (decay if decay.ndim == 3 else decay[..., None])[..., None] * state
        for i in range(t * updates, (t + 1) * updates):
            residual = v[:, i] - torch.einsum("bhkv,bhk->bhv", state, k[:, i])
            state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, i], k[:, i], residual)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1), state
