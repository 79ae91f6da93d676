"""The additive recurrence as defined: a state that is divided by the mass of the keys seen so far.

Source: Qin et al. 2024, "You Only Scan Once", section 3. The mass is kept as its logarithm z, so that keys of any size
are finite.
"""

import torch
from torch import Tensor


def additive_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, state: Tensor, log_mass: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token after another, per head and key channel, D_t = e^{z_t}::

    D_t = D_{t-1} + e^{k_t}
    S_t = D_t^{-1} (D_{t-1} S_{t-1} + e^{k_t} v_t^T) = D_t^{-1} sum_{j <= t} e^{k_j} v_j^T
    o_t = scale * S_t^T q_t

    Returns outputs, the last S ``(B, H, K, V)`` and the last z ``(B, H, K)``. A key of -inf writes nothing.
    """
    outputs = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1)):
        present, seen = k_t != -torch.inf, log_mass != -torch.inf
        # -inf meets nothing: where a key is absent the mass stays, where nothing was seen it is the key
        both = torch.logaddexp(log_mass.where(seen, 0), k_t.where(present, 0))
        mass = torch.where(present & seen, both, torch.where(present, k_t, log_mass))
        keep = torch.where(seen, log_mass - mass, 0).exp()
        write = torch.where(present, k_t - mass, -torch.inf).exp()
        state = keep[..., None] * state + torch.einsum("bhk,bhv->bhkv", write, v_t)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_t))
        log_mass = mass
    return torch.stack(outputs, dim=1), state, log_mass


def full_additive_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """All tokens at once, in any order: ``o_i = scale * q_i softmax_S(K)^T V``, the softmax over tokens."""
    return scale * torch.einsum("bihk,bjhk,bjhv->bihv", q, torch.softmax(k, dim=1), v)
