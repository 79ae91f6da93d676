"""The equation of LoLCATs' attention (Zhang et al. 2025, eq. 6), for queries and keys at any positions."""

import torch
from torch import Tensor


def window_start(positions: Tensor, window: int, terraced: bool) -> Tensor:
    """The first position that softmax sees from ``positions``; what lies before it is linear attention's.

    Sliding: the last ``window`` tokens. Terraced: the query's own block of ``window`` tokens and the block before it.
    """
    if terraced:
        return (positions.div(window, rounding_mode="floor") - 1) * window
    return positions - window + 1


def sliding_linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    mix: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    window: int,
    terraced: bool,
    scale: float,
    state: Tensor | None = None,
    normaliser: Tensor | None = None,
) -> Tensor:
    """Heads repeated to H: q, phi_q ``(B, T, H, .)``, k, v, phi_k ``(B, S, H, .)``, mix ``(H,)`` -> ``(B, T, H, V)``.

    Positions ``(B, T)`` and ``(B, S)``; keys at negative ones are seen by nobody. ``state (B, H, F, V)`` and
    ``normaliser (B, H, F)`` hold the keys before all of these.
    """
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    start = window_start(query, window, terraced)
    near = (key >= start) & (key <= query) & (key >= 0)  # (B, 1, T, S)
    far = (key < start) & (key >= 0)
    scores = scale * torch.einsum("bthk,bshk->bhts", q, k)
    largest = scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)  # m_t, which gradients flow through
    largest = largest.where(near.any(-1, keepdim=True), 0)
    softmax = mix[:, None, None] * (scores - largest).masked_fill(~near, -torch.inf).exp()
    linear = torch.einsum("bthf,bshf->bhts", phi_q, phi_k).masked_fill(~far, 0)
    weights = softmax + linear
    numerator = torch.einsum("bhts,bshv->bthv", weights, v)
    denominator = weights.sum(-1).movedim(1, 2)
    if state is not None and normaliser is not None:
        numerator = numerator + torch.einsum("bthf,bhfv->bthv", phi_q, state)
        denominator = denominator + torch.einsum("bthf,bhf->bth", phi_q, normaliser)
    return numerator / denominator.where(denominator != 0, 1)[..., None]
