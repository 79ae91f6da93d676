"""The running log-sum-exp of every channel, ``z_t = log(e^{z_0} + sum_{j <= t} e^{k_j})``, per packed sequence.

Weights ``e^{k_j - z_t}`` with j <= t lie in [0, 1]: additive recurrences are computed through them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels import packing
from subquad.kernels.operators import Operator

ABSENT = -1e30  # stands for -inf inside torch's logcumsumexp, whose gradient knows no -inf


def run(k: Tensor, first: Tensor, cu_seqlens: Tensor | None, *, backend: str) -> tuple[Tensor, Tensor]:
    """``z (B, T, C)`` and its last value per sequence ``(N, C)``.

    Args:
        k: ``(B, T, C)``; -inf leaves a token out.
        first: ``(N, C)`` of k's dtype, the log mass before the first token, -inf for none.
        cu_seqlens: ``(N + 1,)`` with B = 1, or None.
        backend: ``cpu`` is the numba kernel (float32); all others take torch's own ``logcumsumexp``.
    """
    if backend == "cpu":
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
        z, last = _OPERATOR(k.contiguous(), first.contiguous(), offsets)
        return z, last
    if cu_seqlens is None:
        z = _cumulative(k, first)
        return z, z[:, -1].clone()
    z, last = torch.zeros_like(k), first
    for group in packing.by_length(cu_seqlens.tolist(), k.device):
        own = k[0][group.tokens].where(group.real[..., None], -torch.inf)
        part = _cumulative(own, first[group.sequences])
        tokens = group.tokens[group.real]
        z = z.index_put((torch.zeros_like(tokens), tokens), part[group.real])
        last = last.index_put((group.sequences,), part[:, -1])
    return z, last


def _cumulative(k: Tensor, first: Tensor) -> Tensor:
    joined = torch.cat([first[:, None], k], 1)
    z = joined.where(joined != -torch.inf, ABSENT).logcumsumexp(1)[:, 1:]
    # ABSENT has room: n of them are log(n) above it, and any real score is far above that
    return z.where(z > ABSENT / 2, -torch.inf)


def _shapes(k: Tensor, first: Tensor, cu_seqlens: Tensor | None) -> Sequence[Tensor]:
    return torch.empty_like(k), torch.empty_like(first)


_OPERATOR = Operator(
    "log_mass",
    "subquad.kernels.prefix.log_mass_cpu",
    arguments="Tensor k, Tensor first, Tensor? cu_seqlens",
    outputs=2,
    differentiable=(0, 1),
    shapes=_shapes,
)
