"""Attention over chosen blocks as the torch operator ``subquad::block_sparse_cpu``; numba loads at the first call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.operators import Operator


def _shapes(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Sequence[Tensor]:
    output = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
    return output, q.new_empty(q.shape[:3], dtype=torch.float32)


block_sparse_cpu = Operator(
    "block_sparse_cpu",
    "subquad.kernels.block_sparse.cpu",
    arguments=(
        "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, Tensor starts, Tensor ends, "
        "int block_q, int block_k, int window, int sinks, bool causal, float scale"
    ),
    outputs=2,
    differentiable=(0, 1, 2),
    shapes=_shapes,
)
