"""Linear attention as defined: scores without a softmax, so that keys and values sum up to one matrix.

Source: Katharopoulos et al. 2020, "Transformers are RNNs", eq. 7 (causal: eq. 12); the caller applies the feature map.
"""

import torch
from torch import Tensor


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Causal, one token after another::

    state_t  = state_{t-1} + k_t v_t^T
    output_t = scale * state_t^T q_t
    """
    state, outputs = initial_state, []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1)):
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_t))
    return torch.stack(outputs, dim=1), state


def full_linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Non-causal: every query reads the state after all keys, in the order of the definition, pair by pair."""
    scores = scale * torch.einsum("bihk,bjhk->bhij", q, k)
    state = initial_state + torch.einsum("bjhk,bjhv->bhkv", k, v)
    output = torch.einsum("bhij,bjhv->bihv", scores, v) + scale * torch.einsum("bihk,bhkv->bihv", q, initial_state)
    return output, state
