"""Attention with one query as defined: a recurrence over the largest score, the denominator and the numerator.

Source: Feng et al. 2024, "Attention as an RNN", section 3: the associative operator of its prefix scan, applied to one
token after another.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PrefixState(NamedTuple):
    """What attention with one query has seen: sums of weights ``e^{s_j - maximum}``. Empty: ``(-inf, 0, 0)``."""

    maximum: Tensor  # (B, H) float32, the largest score
    denominator: Tensor  # (B, H) float32, the sum of the weights
    numerator: Tensor  # (B, H, V) float32, the weighted sum of the values


def combine_prefix(a: PrefixState, b: PrefixState) -> PrefixState:
    """The state after the tokens of a and those of b::

        m = max(m_a, m_b)        u = u_a e^{m_a - m} + u_b e^{m_b - m}        w likewise

    Associative and commutative; an empty state changes nothing. States of disjoint pieces merge exactly.

    Args:
        a, b: triples ``(B, H), (B, H), (B, H, V)``, or any shapes that broadcast.

    Example:
        >>> a = PrefixState(torch.zeros(1), torch.ones(1), torch.tensor([[4.0]]))
        >>> b = PrefixState(torch.tensor([1.0]).log(), torch.ones(1), torch.tensor([[6.0]]))
        >>> m, u, w = combine_prefix(a, b)
        >>> (w / u[..., None]).item()
        5.0
    """
    maximum = torch.maximum(a.maximum, b.maximum)
    base = maximum.where(maximum != -torch.inf, 0)  # two empty states: -inf - -inf would be NaN
    shrink_a, shrink_b = (a.maximum - base).exp(), (b.maximum - base).exp()
    return PrefixState(
        maximum,
        a.denominator * shrink_a + b.denominator * shrink_b,
        a.numerator * shrink_a[..., None] + b.numerator * shrink_b[..., None],
    )


def prefix_attention_reference(scores: Tensor, values: Tensor, state: PrefixState) -> tuple[Tensor, PrefixState]:
    """One token after another, ``(s_t, 1, v_t)`` combined with what came before::

        o_t = w_t / u_t = sum_{j <= t} e^{s_j} v_j / sum_{j <= t} e^{s_j}

    A token of score -inf is not there; before the first that is, o_t = 0.
    """
    outputs = []
    for score, value in zip(scores.unbind(1), values.unbind(1)):
        state = combine_prefix(state, PrefixState(score, torch.ones_like(score), value))
        seen = state.maximum != -torch.inf
        mean = state.numerator / state.denominator.where(seen, 1)[..., None]
        outputs.append(mean.where(seen[..., None], 0))
    return torch.stack(outputs, dim=1), state
