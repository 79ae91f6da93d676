"""Causal Taylor attention as the torch operator ``subquad::taylor_cpu``; numba is imported at the first call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.operators import Operator
from subquad.kernels.taylor.features import feature_width


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> Sequence[Tensor]:
    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(states, q.shape[2], feature_width(q.shape[3]), v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape, dtype=torch.float32), state


taylor_cpu = Operator(
    "taylor_cpu",
    "subquad.kernels.taylor.cpu",
    arguments="Tensor q, Tensor k, Tensor v, Tensor? initial_state, Tensor? cu_seqlens, float scale",
    outputs=2,
    differentiable=(0, 1, 2, 3),
    shapes=_shapes,
)
