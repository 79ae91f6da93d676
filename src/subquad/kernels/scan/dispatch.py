"""The kernels of this room as torch operators: the selective scan on a CPU and a GPU, the short convolution on a CPU.

``subquad::selective_scan_cpu`` (numba) and ``subquad::selective_scan_gpu`` (Triton) have one signature. The modules
behind the operators are imported at the first call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.operators import Operator


def run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``y (B, T, D)`` in u's dtype and the last state ``(N, D, states)`` float32, on ``backend`` (cpu or gpu).

    ``u, delta, gate (B, T, D)``; ``A (D, states)``, ``D, delta_bias (D,)``, ``initial_state (N, D, states)`` float32;
    ``B, C (B, T, groups, states)``. With ``delta_bias`` the step is ``softplus(delta + delta_bias)``; with ``gate`` the
    output is multiplied by ``SiLU(gate)``.
    """
    operator, operands = OPERATORS[backend], (u, delta, A, B, C, D, delta_bias, gate, initial_state)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    plain = not torch.compiler.is_compiling() and type(u) is Tensor
    if u.shape[1] == 1 and cu_seqlens is None and initial_state is not None and plain and not differentiable:
        y, state = operator.module.step(*operands)
        return y, state
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
    y, state, _ = operator(*operands, cu_seqlens, differentiable)
    return y, state


def _operator(backend: str) -> Operator:
    def shapes(*arguments: Tensor | None) -> Sequence[Tensor]:
        u, A, cu_seqlens, save = arguments[0], arguments[2], arguments[9], arguments[10]
        assert u is not None
        assert A is not None
        sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = operator.module.saved_shape(*u.shape, A.shape[1], sequences) if save else (0, 0, 0)
        float32 = {"dtype": torch.float32}
        return u.new_empty(u.shape), u.new_empty(sequences, *A.shape, **float32), u.new_empty(shape, **float32)

    operator = Operator(
        f"selective_scan_{backend}",
        f"subquad.kernels.scan.{backend}",
        arguments="Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? gate, "
        "Tensor? initial_state, Tensor? cu_seqlens, bool save",
        outputs=2,
        saved=1,
        differentiable=range(9),
        shapes=shapes,
    )
    return operator


OPERATORS = {backend: _operator(backend) for backend in ("cpu", "gpu")}

convolution_cpu = Operator(
    "short_convolution_cpu",
    "subquad.kernels.scan.convolution_cpu",
    arguments="Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, bool silu",
    outputs=1,
    differentiable=range(4),
    shapes=lambda x, *_: [x.new_empty(x.shape)],
)
