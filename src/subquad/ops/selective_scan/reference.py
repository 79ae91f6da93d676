"""The selective scan as defined: a diagonal state space model whose step, input and output maps come from the token.

Source: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", equation 2, with A
discretised exactly (zero-order hold) and B by Euler's rule, as their algorithm 2 does.
"""

import torch
from torch import Tensor


def selective_scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after another, per channel d and state n::

        state_t[d, n] = exp(delta_t[d] A[d, n]) state_{t-1}[d, n] + delta_t[d] B_t[n] u_t[d]
        output_t[d]   = sum_n C_t[n] state_t[d, n] + D[d] u_t[d]

    u, delta ``(B, T, D)``; A ``(D, N)``; B, C ``(B, T, G, N)``, each of the G shared by D / G neighbouring channels.
    """
    per_group = u.shape[2] // B.shape[2]
    B, C = (x.repeat_interleave(per_group, dim=2) for x in (B, C))
    state, outputs = initial_state, []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        decay = torch.exp(torch.einsum("bd,dn->bdn", delta_t, A))
        state = decay * state + torch.einsum("bd,bdn,bd->bdn", delta_t, B_t, u_t)
        output = torch.einsum("bdn,bdn->bd", C_t, state)
        outputs.append(output if D is None else output + D * u_t)
    return torch.stack(outputs, dim=1), state
