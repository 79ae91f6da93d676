"""The weighted average of RWKV-4 as defined: exponential keys, a decay per channel, a bonus for the token itself.

Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", eq. 16, and its appendix on numerical
stability; the state is that of transformers' ``rwkv_linear_attention``.
"""

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor]


def wkv_reference(k: Tensor, v: Tensor, log_decay: Tensor, time_first: Tensor, state: State) -> tuple[Tensor, State]:
    """One token after another, per channel, the sums kept over ``e^maximum``::

        o_t = (sum_{j<t} e^{(t-1-j) log_decay + k_j} v_j + e^{time_first + k_t} v_t) / (the same without v)

    k, v ``(B, T, D)``, log_decay, time_first ``(D,)``, state three of ``(B, D)``.
    """
    numerator, denominator, maximum = state
    outputs = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1)):
        bonus = time_first + k_t
        largest = torch.maximum(maximum, bonus)
        past, now = torch.exp(maximum - largest), torch.exp(bonus - largest)
        outputs.append((past * numerator + now * v_t) / (past * denominator + now))
        kept = maximum + log_decay
        maximum = torch.maximum(kept, k_t)
        past, now = torch.exp(kept - maximum), torch.exp(k_t - maximum)
        numerator, denominator = past * numerator + now * v_t, past * denominator + now
    return torch.stack(outputs, dim=1), (numerator, denominator, maximum)
