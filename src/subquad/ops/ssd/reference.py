"""Mamba-2's state space model as defined: one decay per head and token, maps shared by groups of heads.

Source: Dao and Gu 2024, "Transformers are SSMs", equation 2 with A a multiple of the identity (section 5), discretised
as in Mamba: A exactly, B by Euler's rule.
"""

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after another, per head h::

        state_t[h]  = exp(delta_t[h] A[h]) state_{t-1}[h] + delta_t[h] x_t[h] B_t^T
        output_t[h] = state_t[h] C_t + D[h] x_t[h]

    x ``(B, T, H, P)``; delta ``(B, T, H)``; A, D ``(H,)``; B, C ``(B, T, G, N)``, each of the G shared by H / G
    neighbouring heads; state ``(B, H, P, N)``.
    """
    per_group = x.shape[2] // B.shape[2]
    B, C = (maps.repeat_interleave(per_group, dim=2) for maps in (B, C))
    state, outputs = initial_state, []
    for x_t, delta_t, B_t, C_t in zip(x.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1)):
        state = torch.exp(delta_t * A)[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", delta_t, x_t, B_t)
        output = torch.einsum("bhpn,bhn->bhp", state, C_t)
        outputs.append(output if D is None else output + D[:, None] * x_t)
    return torch.stack(outputs, dim=1), state
