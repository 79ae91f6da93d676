"""Means over prefixes as a torch operator: one forward and one backward per compiled backend.

``subquad::prefix_cpu`` and ``subquad::prefix_gpu`` (and ``..._backward``) have the same signatures; the modules behind
them (:mod:`.cpu` on numba, :mod:`.gpu` on Triton) are imported at the first call.
"""

import importlib
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.prefix import chunked
from subquad.kernels.prefix.chunked import Triple

FORWARD_SCHEMA = (
    "(Tensor scores, Tensor values, Tensor maximum, Tensor denominator, Tensor numerator, Tensor? cu_seqlens, "
    "bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_o, Tensor grad_maximum, Tensor grad_denominator, Tensor grad_numerator, Tensor scores, "
    "Tensor values, Tensor maximum, Tensor denominator, Tensor numerator, Tensor o, Tensor last_maximum, "
    "Tensor last_denominator, Tensor last_numerator, Tensor saved, Tensor? cu_seqlens) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
Forward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def run(
    scores: Tensor, values: Tensor, state: Triple, cu_seqlens: Tensor | None, *, backend: str
) -> tuple[Tensor, Triple]:
    """Output ``(B, T, H, V)`` in values' dtype and the last triple, on ``backend`` (chunked, cpu or gpu).

    Scores and state are float32 (float64 with float64 values, on chunked).
    """
    if backend == "chunked":
        output, last = chunked.run(scores, values.to(scores.dtype), state, cu_seqlens)
        return output.to(values.dtype), last
    # on a CPU float32 throughout: the backward pass multiplies outputs, and what rounding takes from them adds up
    wide = values.float() if backend == "cpu" else values
    operands = [x.contiguous() for x in (scores, wide, *state)]
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in operands)
    if plain and not differentiable and not torch.compiler.is_compiling():  # the dispatcher's 20 us buy nothing
        output, *last, _ = _module(backend).forward(*(x.detach() for x in operands), cu_seqlens, False)
    else:
        output, *last, _ = _OPERATORS[backend](*operands, cu_seqlens, differentiable)
    return output.to(values.dtype), (last[0], last[1], last[2])


def route_maximum(
    grad_last: Tensor, scores: Tensor, maximum: Tensor, last_maximum: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of the last maximum ``(N, H)``, on scores ``(B, T, H)`` and on the first maximum ``(N, H)``.

    It goes to whichever is the largest, the first of several.
    """
    from_start = maximum == last_maximum
    grad_maximum = grad_last.where(from_start, 0)
    grad_scores = torch.zeros_like(scores)
    heads = torch.arange(scores.shape[2], device=scores.device)
    if cu_seqlens is None:
        pieces = [(scores, slice(None), grad_scores)]
    else:
        bounds = cu_seqlens.tolist()
        pieces = [
            (scores[:, a:b], slice(n, n + 1), grad_scores[:, a:b]) for n, (a, b) in enumerate(pairwise(bounds)) if b > a
        ]
    for piece, rows, target in pieces:
        place = (piece == last_maximum[rows, None]).to(torch.int8).argmax(1)
        row = torch.arange(piece.shape[0], device=scores.device)[:, None]
        target[row, place, heads] = grad_last[rows].where(~from_start[rows], 0)
    return grad_scores, grad_maximum


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"subquad.kernels.prefix.{backend}")


def _register(backend: str) -> Forward:
    name = f"subquad::prefix_{backend}"

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _module(backend).forward(*args)

    def backward(*args: Any) -> tuple[Tensor, ...]:
        grad_maximum, grad_denominator, grad_numerator, scores = args[1:5]
        maximum, last_maximum, last_denominator, last_numerator, cu_seqlens = args[6], *args[10:13], args[14]
        d_scores, d_values, d_maximum, d_denominator, d_numerator = _module(backend).backward(*args)
        # the last sums are relative to the last maximum, which is itself one of the scores
        moved = grad_maximum - last_denominator * grad_denominator - (last_numerator * grad_numerator).sum(-1)
        if bool(moved.any()):
            on_scores, on_maximum = route_maximum(moved, scores, maximum, last_maximum, cu_seqlens)
            d_scores, d_maximum = d_scores + on_scores, d_maximum + on_maximum
        return d_scores, d_values, d_maximum, d_denominator, d_numerator

    operator = torch.library.custom_op(name, forward, mutates_args=(), schema=FORWARD_SCHEMA)
    backward_operator = torch.library.custom_op(f"{name}_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA)

    @operator.register_fake
    def _(
        scores: Tensor,
        values: Tensor,
        maximum: Tensor,
        denominator: Tensor,
        numerator: Tensor,
        cu_seqlens: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, ...]:
        saved = scores.new_empty((2, *scores.shape) if save else (0,))
        return (torch.empty_like(values), *map(torch.empty_like, (maximum, denominator, numerator)), saved)

    @backward_operator.register_fake
    def _(
        grad_o: Tensor,
        grad_maximum: Tensor,
        grad_denominator: Tensor,
        grad_numerator: Tensor,
        scores: Tensor,
        values: Tensor,
        maximum: Tensor,
        denominator: Tensor,
        numerator: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, (scores, values, maximum, denominator, numerator)))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        scores, values, maximum, denominator, numerator, cu_seqlens, o, *last, saved = ctx.saved_tensors
        dense = [
            torch.zeros_like(like) if grad is None else grad.contiguous()
            for grad, like in zip(grads[:4], (o, maximum, denominator, numerator))
        ]
        gradients = backward_operator(
            *dense, scores, values, maximum, denominator, numerator, o, *last, saved, cu_seqlens
        )
        return (*gradients, None, None)

    def refuse(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        raise RuntimeError(f"backend {backend!r} has no second derivative; use backend='chunked'")

    operator.register_autograd(differentiate, setup_context=setup_context)
    backward_operator.register_autograd(refuse)
    return operator  # type: ignore[return-value]


_OPERATORS: dict[str, Forward] = {backend: _register(backend) for backend in ("cpu", "gpu")}
