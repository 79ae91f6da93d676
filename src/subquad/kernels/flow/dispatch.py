"""The gates of causal flow attention as the torch operator ``subquad::flow_gates_cpu``; numba loads at first use."""

from collections.abc import Sequence

from torch import Tensor

from subquad.kernels.operators import Operator


def _shapes(
    q: Tensor, k: Tensor, keep: Tensor | None, sums: Tensor, competition: Tensor, count: Tensor, *_: object
) -> Sequence[Tensor]:
    gates = q.new_empty(q.shape[:3], dtype=sums.dtype)
    return gates, gates.clone(), sums.new_empty(sums.shape), competition.new_empty(competition.shape)


flow_gates_cpu = Operator(
    "flow_gates_cpu",
    "subquad.kernels.flow.cpu",
    arguments="Tensor q, Tensor k, Tensor? keep, Tensor sums, Tensor competition, Tensor count, Tensor? cu_seqlens, "
    "float eps, float clip, float temperature",
    outputs=4,
    differentiable=(0, 1, 3, 4),
    shapes=_shapes,
)
