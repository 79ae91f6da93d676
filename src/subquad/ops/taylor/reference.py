"""Taylor linear attention as defined: explicit features, token by token or pair by pair.

Source: Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff", section 4.
"""

import torch
from torch import Tensor

from subquad.kernels.taylor.features import taylor_features
from subquad.ops.linear.reference import linear_attention_reference


def taylor_attention_reference(
    q: Tensor, k: Tensor, values: Tensor, *, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Causal, one token after another::

    state_t  = state_{t-1} + phi(k_t) values_t^T
    output_t = state_t^T phi(q_t)
    """
    features = taylor_features(q, scale), taylor_features(k, scale)
    return linear_attention_reference(*features, values, scale=1.0, initial_state=initial_state)


def full_taylor_attention_reference(
    q: Tensor, k: Tensor, values: Tensor, *, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Non-causal: ``output_i = sum_j (1 + s + s^2 / 2) values_j`` over all j, ``s = scale q_i . k_j``."""
    score = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    state = initial_state + torch.einsum("bjhf,bjhv->bhfv", taylor_features(k, scale), values)
    output = torch.einsum("bhij,bjhv->bihv", 1 + score + score.square() / 2, values)
    return output + torch.einsum("bihf,bhfv->bihv", taylor_features(q, scale), initial_state), state
