"""xLSTM's matrix memory as defined: exponential input gates, kept over the largest exponent so far.

Source: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eq. 19 to 27 with the stabiliser of eq. 15 to 17, in
the form of the authors' and transformers' code: the denominator's floor is ``e^{-m}`` and ``eps`` is added to it.
"""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def mlstm_reference(
    q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_forget: Tensor, *, scale: float, eps: float, state: State
) -> tuple[Tensor, State]:
    """One token after another, per head, f and i the forget and input gates::

    m_t = max(log f_t + m_{t-1}, log i_t)
    C_t = e^{log f_t + m_{t-1} - m_t} C_{t-1} + e^{log i_t - m_t} k_t v_t^T      n_t the same of k_t
    h_t = scale C_t^T q_t / (max(|scale n_t . q_t|, e^{-m_t}) + eps)
    """
    matrix, normalizer, maximum = state
    outputs = []
    for q_t, k_t, v_t, i_t, f_t in zip(*(x.unbind(1) for x in (q, k, v, input_gate, log_forget))):
        largest = torch.maximum(f_t + maximum, i_t)
        kept, added = torch.exp(f_t + maximum - largest)[..., None], torch.exp(i_t - largest)[..., None]
        write = added * k_t
        matrix = kept[..., None] * matrix + torch.einsum("bhk,bhv->bhkv", write, v_t)
        normalizer, maximum = kept * normalizer + write, largest
        weight = scale * torch.einsum("bhk,bhk->bh", normalizer, q_t)
        divisor = torch.maximum(weight.abs(), torch.exp(-maximum)) + eps
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", matrix, q_t) / divisor[..., None])
    return torch.stack(outputs, dim=1), (matrix, normalizer, maximum)
