"""The recurrence as a torch operator: one forward and one backward per compiled backend, known to autograd and compile.

``subquad::recurrence_cpu`` and ``subquad::recurrence_gpu`` (and ``..._backward``) have the same signatures; the modules
behind them (:mod:`.cpu` on numba, :mod:`.gpu` on Triton) are imported at the first call.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from subquad.kernels import packing
from subquad.kernels.recurrence import chunked

FORWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, int chunk_size, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_o, Tensor grad_state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor saved, Tensor saved_updates, float scale, int chunk_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
Forward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    chunk_size: int,
    backend: str,
    value_log_decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``(B, T, H, V)`` in v's dtype and last state ``(N, H, K, V)``, on ``backend`` (chunked, cpu or gpu).

    Shapes as in :func:`.chunked.recurrence`; gates, beta and states float32 (float64 with float64 inputs, on chunked).
    """
    if backend == "chunked":
        output, state = _run_chunked(
            q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, chunk_size, value_log_decay
        )
        return output.to(v.dtype), state
    operands = [None if x is None else x.contiguous() for x in (q, k, v, log_decay, beta, initial_state)]
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
    if not differentiable and _may_skip_dispatch(operands):
        module = _module(backend)
        q, k, v, log_decay, beta, initial_state = operands  # type: ignore[assignment]
        if q.shape[1] == 1 and cu_seqlens is None and initial_state is not None:
            return _step(module, q, k, v, log_decay, beta, initial_state, scale)
        return module.forward(q, k, v, log_decay, beta, initial_state, cu_seqlens, scale, chunk_size, False)[:2]
    operator = _OPERATORS[backend]
    output, state, _, _ = operator(*operands, cu_seqlens, scale, chunk_size, differentiable)
    return output, state


def _run_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    value_log_decay: Tensor | None,
) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(accumulate) for x in (q, k, v))
    if cu_seqlens is None:
        return chunked.recurrence(
            q, k, v, log_decay, beta, initial_state, scale, chunk_size, value_log_decay=value_log_decay
        )
    updates = k.shape[1] // q.shape[1]
    sequences = len(cu_seqlens) - 1
    output = torch.zeros_like(v[:, : q.shape[1]])
    states = v.new_zeros(sequences, v.shape[2], k.shape[3], v.shape[3])
    if initial_state is not None:
        states = states + initial_state

    def part(x: Tensor | None, group: packing.Group, n: int = 1) -> Tensor | None:
        if x is None or x.ndim == 1:
            return x
        by_token = x.unflatten(1, (-1, n)) if n > 1 else x
        taken = packing.take(by_token, group)
        return taken.flatten(1, 2) if n > 1 else taken

    for group in packing.by_length(cu_seqlens.tolist(), q.device):
        gate = log_decay
        if gate is not None and gate.ndim == 1:  # a constant decay must stop where a sequence ends
            gate = gate.expand(1, q.shape[1], -1)
        o, last = chunked.recurrence(
            part(q, group),  # type: ignore[arg-type]
            part(k, group, updates),  # type: ignore[arg-type]
            part(v, group, updates),  # type: ignore[arg-type]
            part(gate, group),
            part(beta, group, updates),
            states[group.sequences],
            scale,
            chunk_size,
            value_log_decay=part(value_log_decay, group),
        )
        output = output.index_put((torch.zeros_like(group.tokens[group.real]), group.tokens[group.real]), o[group.real])
        states = states.index_put((group.sequences,), last)
    return output, states


def _step(
    module: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    gate = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, 0]
    o, state = module.step(q[:, 0], k, v, gate, beta, state, scale)
    return o[:, None], state


def _may_skip_dispatch(operands: list[Tensor | None]) -> bool:
    """Plain tensors outside any tracing: the operator's own dispatch (about 20 us) buys nothing."""
    return not torch.compiler.is_compiling() and all(
        x is None or type(x) in (Tensor, torch.nn.Parameter) for x in operands
    )


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"subquad.kernels.recurrence.{backend}")


def _register(backend: str) -> Forward:
    name = f"subquad::recurrence_{backend}"

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _module(backend).forward(*args)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        q = args[2]
        gradients = _module(backend).backward(*args)
        return tuple(q.new_empty(0) if x is None else x for x in gradients)

    operator = torch.library.custom_op(name, forward, mutates_args=(), schema=FORWARD_SCHEMA)
    backward_operator = torch.library.custom_op(f"{name}_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA)

    @operator.register_fake
    def _(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        chunk_size: int,
        save: bool,
    ) -> tuple[Tensor, ...]:
        states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((0,), (0,))
        if save:
            ndim = 0 if log_decay is None else log_decay.ndim
            shapes = _module(backend).saved_shapes(
                q.shape, k.shape, v.shape[-1], ndim, beta is not None, states, chunk_size
            )
        float32 = {"dtype": torch.float32}
        return (
            v.new_empty(*q.shape[:3], v.shape[3]),
            q.new_empty(states, q.shape[2], q.shape[3], v.shape[3], **float32),
            q.new_empty(*shapes[0], **float32),
            q.new_empty(*shapes[1], **float32),
        )

    @backward_operator.register_fake
    def _(
        grad_o: Tensor,
        grad_state: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        saved: Tensor,
        saved_updates: Tensor,
        scale: float,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        none = q.new_empty(0)
        return (
            torch.empty_like(q),
            torch.empty_like(k),
            torch.empty_like(v),
            none if log_decay is None else torch.empty_like(log_decay),
            none if beta is None else torch.empty_like(beta),
            torch.empty_like(grad_state),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.scale, ctx.chunk_size, _ = inputs
        ctx.state_shape = output[1].shape
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_o: Tensor | None, grad_state: Tensor | None, *_: Any) -> tuple[Any, ...]:
        q, k, v, log_decay, beta, initial_state, cu_seqlens, saved, saved_updates = ctx.saved_tensors
        if grad_o is None:
            grad_o = v.new_zeros(*q.shape[:3], v.shape[3])
        if grad_state is None:
            grad_state = q.new_zeros(ctx.state_shape, dtype=torch.float32)
        dq, dk, dv, dg, dbeta, dstate = backward_operator(
            grad_o.contiguous(),
            grad_state.contiguous(),
            *(q, k, v, log_decay, beta, initial_state, cu_seqlens, saved, saved_updates),
            ctx.scale,
            ctx.chunk_size,
        )
        return (
            *(dq, dk, dv),
            None if log_decay is None else dg,
            None if beta is None else dbeta,
            None if initial_state is None else dstate,
            *(None, None, None, None),
        )

    def refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        raise RuntimeError(f"backend {backend!r} has no second derivative; use backend='chunked'")

    operator.register_autograd(differentiate, setup_context=setup_context)
    backward_operator.register_autograd(refuse)
    return operator  # type: ignore[return-value]


_OPERATORS: dict[str, Forward] = {backend: _register(backend) for backend in ("cpu", "gpu")}
