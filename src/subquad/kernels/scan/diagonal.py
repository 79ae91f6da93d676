"""The diagonal scan ``h_t = a_t h_{t-1} + x_t`` as torch operators; the modules behind them load at the first call."""

import torch
from torch import Tensor

from subquad.kernels.operators import Operator

OPERATORS = {
    backend: Operator(
        f"diagonal_scan_{backend}",
        f"subquad.kernels.scan.diagonal_{backend}",
        arguments="Tensor decay, Tensor x, Tensor initial_state, Tensor? cu_seqlens",
        outputs=2,
        differentiable=range(3),
        shapes=lambda decay, x, initial_state, cu_seqlens: (
            x.new_empty(x.shape),
            initial_state.new_empty(initial_state.shape),
        ),
    )
    for backend in ("cpu", "gpu")
}


def run(
    decay: Tensor, x: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None, *, backend: str
) -> tuple[Tensor, Tensor]:
    """All states ``(B, T, D)`` in x's dtype and the last ``(N, D)`` float32, on ``backend`` (cpu or gpu).

    ``decay, x (B, T, D)``, float32, bfloat16 or float16, computed in float32; ``initial_state (N, D)`` float32.
    """
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
    h, state = OPERATORS[backend](decay, x, initial_state, cu_seqlens)
    return h, state
