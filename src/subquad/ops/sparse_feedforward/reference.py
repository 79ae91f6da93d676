"""Sparse feed-forward layers as defined: everything is computed, and what is not active is set to zero.

Source: Song et al. 2024, "ProSparse", section 3 (zero after the activation); Luo et al. 2024, "Sparsing Law", section 3
(small after the product with the up-projection).
"""

from torch import Tensor
from torch.nn import functional as F


def active_gate(s: Tensor, gate_threshold: float | Tensor) -> Tensor:
    """s where ``|s| >= gate_threshold``, else 0."""
    return s.where(s.abs() >= gate_threshold, 0)


def active_output(h: Tensor, output_threshold: Tensor | None) -> Tensor:
    """h where ``|h| >= output_threshold``, else 0."""
    return h if output_threshold is None else h.where(h.abs() >= output_threshold, 0)


def gated_feedforward_reference(
    x: Tensor, s: Tensor, up_weight: Tensor, down_weight: Tensor, output_threshold: Tensor | None
) -> Tensor:
    """``W_down active(s * (W_up x))``; x ``(N, D)``, s ``(N, F)`` the active gate."""
    return F.linear(active_output(s * F.linear(x, up_weight), output_threshold), down_weight)
