"""How near the weights of a linear attention are to those of softmax: the loss that trains feature maps, and measures.

Zhang et al. 2024 (Hedgehog), section 3 (entropy, monotonicity) and section 4.2 (distillation). All work on blocks of
query rows, so that no more than ``block_size`` rows of weights exist at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.layers.feature_attention import FeatureMap

FLOOR = 1e-6  # added to a weight before its logarithm


class Rows(NamedTuple):
    """Weights of some queries ``(B, H, R, S)``, zero where a key is not visible."""

    first: int  # place of the first query
    scores: Tensor  # q . k / sqrt(K), not masked
    softmax: Tensor
    weights: Tensor  # of the linear attention, divided by their sum
    visible: Tensor  # (B or 1, 1, R, S)
    real: Tensor  # (B or 1, 1, R): queries that are no padding


def rows_of_weights(
    phi: FeatureMap, q: Tensor, k: Tensor, *, causal: bool, mask: Tensor | None, block_size: int
) -> Iterator[Rows]:
    """Softmax's weights and those of ``phi`` from the same queries and keys, a block of queries after another.

    Args:
        phi: whose weights are compared.
        q, k: ``(B, T, H, K)`` and ``(B, S, H, K)``; S = T if causal.
        causal: whether query t sees the keys up to t only.
        mask: ``(B, S)`` bool, True = a real key, and with ``causal`` a real query.
        block_size: queries per block.
    """
    keys = torch.arange(k.shape[1], device=k.device)
    for first in range(0, q.shape[1], block_size):
        query = q[:, first : first + block_size]
        key = k[:, : first + query.shape[1]] if causal else k  # later keys are seen by none of these queries
        place = first + torch.arange(query.shape[1], device=q.device)
        visible = torch.ones(1, 1, len(place), key.shape[1], dtype=torch.bool, device=q.device)
        if causal:
            visible = visible & (keys[: key.shape[1]] <= place[:, None])
        real = torch.ones(1, 1, len(place), dtype=torch.bool, device=q.device)
        if mask is not None:
            visible = visible & mask[:, None, None, : key.shape[1]]
            real = mask[:, None, place] if causal else real
        scores = torch.einsum("bthk,bshk->bhts", query, key) * q.shape[-1] ** -0.5
        hidden = ~(visible | ~real[..., None])  # a padded query may see nothing: its row stays finite, and is left out
        softmax = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        weights = phi.weights(query, key) * visible
        weights = weights / (weights.sum(-1, keepdim=True) + FLOOR)
        yield Rows(first, scores, softmax, weights, visible, real)


def mimicry_loss(
    phi: FeatureMap, q: Tensor, k: Tensor, *, causal: bool = True, mask: Tensor | None = None, block_size: int = 256
) -> Tensor:
    """Mean over queries of ``-sum_j p_tj log a_tj``, softmax's weights p against those of ``phi``, per head ``(H,)``.

    p is softmax of ``q . k / sqrt(K)`` and has no gradient; at its least the loss is the entropy of p.

    Example:
        >>> from subquad.layers.feature_attention import build_feature_map
        >>> q = k = torch.zeros(1, 2, 1, 4)  # even weights: log 1 and log 2, in the mean log 2 / 2
        >>> mimicry_loss(build_feature_map("relu", 1, 4), q + 1, k + 1).double().round(decimals=3).tolist()
        [0.347]
    """
    total, count = q.new_zeros(q.shape[2]), q.new_zeros(())
    for rows in rows_of_weights(phi, q, k, causal=causal, mask=mask, block_size=block_size):
        terms = -(rows.softmax.detach() * (rows.weights + FLOOR).log()).sum(-1)  # (B, H, R)
        total = total + terms.where(rows.real, 0).sum((0, 2))
        count = count + rows.real.expand(terms.shape[0], 1, -1).sum()
    return total / count.clamp(min=1)


class WeightMeasures(NamedTuple):
    """Per head ``(H,)``, means over queries: of a linear attention beside softmax on the same queries and keys.

    Entropies are in nats. Monotonicity is the rank correlation of a query's weights with its scores, 1 for softmax.
    """

    entropy: Tensor
    softmax_entropy: Tensor
    monotonicity: Tensor
    divergence: Tensor  # Kullback-Leibler, of softmax's weights from these


@torch.no_grad()
def measure_weights(
    phi: FeatureMap,
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    queries: Tensor | None = None,
    first_row: int = 32,
    block_size: int = 256,
) -> WeightMeasures:
    """Entropy, monotonicity and divergence of ``phi``'s weights; see :class:`WeightMeasures`.

    Args:
        queries: ``(B, T)`` bool, those that count; None: all.
        first_row: queries before it see too few keys to tell anything, and are left out (causal only).

    Raises:
        ValueError: no query is left.
    """
    sums = [torch.zeros(q.shape[2], dtype=torch.float64, device=q.device) for _ in WeightMeasures._fields]
    count = 0
    for rows in rows_of_weights(phi, q, k, causal=causal, mask=mask, block_size=block_size):
        place = rows.first + torch.arange(rows.weights.shape[2], device=q.device)
        counted = (rows.real & (place >= (first_row if causal else 0))).expand(q.shape[0], 1, -1)
        if queries is not None:
            counted = counted & queries[:, None, place]
        weights, softmax = rows.weights.double(), rows.softmax.double()
        measures = (
            torch.special.entr(weights).sum(-1),
            torch.special.entr(softmax).sum(-1),
            _rank_correlation(weights, rows.scores, rows.visible.expand_as(weights)),
            (torch.special.xlogy(softmax, softmax) - softmax * (weights + FLOOR).log()).sum(-1),
        )
        for total, measure in zip(sums, measures):
            total += measure.where(counted, 0).sum((0, 2))
        count += int(counted.sum())
    if not count:
        raise ValueError(f"no query is left to measure: there are {q.shape[1]}, and first_row is {first_row}")
    return WeightMeasures(*(total / count for total in sums))


def _rank_correlation(x: Tensor, y: Tensor, visible: Tensor) -> Tensor:
    """Spearman's correlation over the visible entries of the last axis; 0 where either side has no variance."""

    def ranks(values: Tensor) -> Tensor:
        order = values.double().masked_fill(~visible, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1).double()
        mean = (order * visible).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
        return (order - mean) * visible

    a, b = ranks(x), ranks(y)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt().clamp(min=1e-12)
