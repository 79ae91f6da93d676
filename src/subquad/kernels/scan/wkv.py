"""RWKV-4's weighted average as torch operators, and in plain torch; numba and Triton load at the first call.

All take ``k, v (B, T, D)``, ``log_decay, time_first (D,)`` and the state, three of ``(N, D)``: numerator, denominator,
and the maximum over which both are kept.
"""

import torch
from torch import Tensor

from subquad.kernels import packing
from subquad.kernels.operators import Operator
from subquad.kernels.scan.chunked import linear_scan

State = tuple[Tensor, Tensor, Tensor]

OPERATORS = {
    backend: Operator(
        f"wkv_{backend}",
        f"subquad.kernels.scan.wkv_{backend}",
        arguments="Tensor k, Tensor v, Tensor log_decay, Tensor time_first, Tensor numerator, Tensor denominator, "
        "Tensor maximum, Tensor? cu_seqlens",
        outputs=4,
        differentiable=range(7),
        shapes=lambda k, v, log_decay, time_first, numerator, *_: (
            v.new_empty(v.shape),
            *(numerator.new_empty(numerator.shape) for _ in range(3)),
        ),
    )
    for backend in ("cpu", "gpu")
}


def maxima(k: Tensor, log_decay: Tensor, first: Tensor, steps: Tensor) -> Tensor:
    """``m_t = max(m_{t-1} + log_decay, k_t)`` from ``first (B, D)`` on, ``(B, T, D)``: what exponents are taken over.

    ``steps (B, T, 1)`` counts the decays up to each token.

    Sums over whole sequences: in float64. The average itself does not depend on their rounding.
    """
    decayed = steps * log_decay.double()
    best = (k.double() - decayed).cummax(1).values
    return (decayed + torch.maximum(best, first.double()[:, None])).to(k.dtype)


def chunked(
    k: Tensor, v: Tensor, log_decay: Tensor, time_first: Tensor, state: State, real: Tensor | None = None
) -> tuple[Tensor, State]:
    """The average and the last state by a scan over what the maxima leave; rows may end in padding (not ``real``)."""
    here = k.new_ones(k.shape[:2]) if real is None else real.to(k.dtype)
    key = k if real is None else k.where(real[..., None], -torch.inf)
    maximum = maxima(key, log_decay, state[2], here.double().cumsum(1)[..., None])
    before = torch.cat([state[2][:, None], maximum[:, :-1]], dim=1)
    kept, added = torch.exp(here[..., None] * log_decay + before - maximum), torch.exp(key - maximum)
    update = added[..., None] * torch.stack([v, torch.ones_like(v)], dim=-1)
    start = torch.stack(state[:2], dim=-1)
    sums, last = linear_scan(kept[..., None].expand_as(update), update, start)
    earlier = torch.cat([start[:, None], sums[:, :-1]], dim=1)
    largest = torch.maximum(before, time_first + k)
    past, now = torch.exp(before - largest), torch.exp(time_first + k - largest)
    output = (past * earlier[..., 0] + now * v) / (past * earlier[..., 1] + now)
    return output, (last[..., 0], last[..., 1], maximum[:, -1])


def packed_chunked(
    k: Tensor, v: Tensor, log_decay: Tensor, time_first: Tensor, state: State, cu_seqlens: Tensor
) -> tuple[Tensor, State]:
    """:func:`chunked` of every packed sequence."""
    output = torch.zeros_like(v)
    for group in packing.by_length(cu_seqlens.tolist(), k.device):
        starts: State = tuple(x[group.sequences] for x in state)  # type: ignore[assignment]
        key, value = packing.take(k, group), packing.take(v, group)
        o, last = chunked(key, value, log_decay, time_first, starts, group.real)
        tokens = group.tokens[group.real]
        output = output.index_put((torch.zeros_like(tokens), tokens), o[group.real])
        state = tuple(x.index_put((group.sequences,), y) for x, y in zip(state, last))  # type: ignore[assignment]
    return output, state
