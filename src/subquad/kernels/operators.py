"""Compiled kernels as torch operators: a forward and a backward function, known to autograd and to compiled graphs.

The functions live in a module that is imported at the first call, so that numba loads only when it is needed.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Shapes = Callable[..., Sequence[Tensor]]


class Operator:
    """``module.forward(*arguments) -> tensors`` and ``module.backward(*gradients, *arguments, *saved) -> gradients``.

    Args:
        name: under ``subquad::``, ending in ``_`` and the backend; the backward operator is called ``..._backward``.
        module: where ``forward`` and ``backward`` live.
        arguments: of forward as a torch schema, tensors first.
        outputs: number of results that have a gradient.
        saved: number of further results, which backward gets again.
        differentiable: places of the arguments whose gradients backward returns, in order; an optional tensor that is
            absent gets an empty one.
        shapes: from the arguments to empty tensors like all results.
        instead: the backend to name where a second derivative is refused.
    """

    def __init__(
        self,
        name: str,
        module: str,
        *,
        arguments: str,
        outputs: int,
        saved: int = 0,
        differentiable: Sequence[int],
        shapes: Shapes,
        instead: str = "chunked",
    ) -> None:
        self._path = module
        self._results = outputs + saved

        def tensors(prefix: str, count: int) -> str:
            return ", ".join(f"Tensor {prefix}_{i}" for i in range(count))

        def results(count: int) -> str:
            return ", ".join(["Tensor"] * count)

        parts = (tensors("grad", outputs), arguments, tensors("saved", saved))
        backward_schema = f"({', '.join(filter(None, parts))}) -> ({results(len(differentiable))})"
        qualified = f"subquad::{name}"

        def forward(*args: Any) -> Any:
            return _unwrapped(self.module.forward(*args))

        def backward(*args: Any) -> Any:
            return _unwrapped(self.module.backward(*args))

        self.registered = torch.library.custom_op(
            qualified, forward, mutates_args=(), schema=f"({arguments}) -> ({results(self._results)})"
        )
        backward_operator = torch.library.custom_op(
            f"{qualified}_backward", backward, mutates_args=(), schema=backward_schema
        )
        self.registered.register_fake(lambda *args: _unwrapped(tuple(shapes(*args))))

        @backward_operator.register_fake
        def _(*args: Any) -> Any:
            given = args[outputs:]
            return _unwrapped(tuple(_like(given[place], args[0]) for place in differentiable))

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
            ctx.others = [x for x in inputs if not isinstance(x, Tensor)]
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *_wrapped(output)[outputs:])

        def differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            kept, others = iter(ctx.saved_tensors), iter(ctx.others)
            inputs = [next(kept) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
            found = _wrapped(backward_operator(*(g.contiguous() for g in gradients[:outputs]), *inputs, *kept))
            result: list[Tensor | None] = [None] * len(inputs)
            for place, gradient in zip(differentiable, found):
                result[place] = gradient if ctx.is_tensor[place] else None
            return tuple(result)

        def refuse(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            backend = name.rpartition("_")[2]
            raise RuntimeError(f"backend {backend!r} has no second derivative; use backend={instead!r}")

        self.registered.register_autograd(differentiate, setup_context=setup_context)
        backward_operator.register_autograd(refuse)

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self._path)

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Plain tensors without gradient skip torch's dispatch, which would take about 20 us."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
        if differentiated or not plain or torch.compiler.is_compiling():
            return _wrapped(self.registered(*arguments))
        return self.module.forward(*arguments)


def _like(argument: Tensor | None, example: Tensor) -> Tensor:
    return example.new_empty(0) if argument is None else argument.new_empty(argument.shape)


def _unwrapped(results: Sequence[Tensor]) -> Any:
    """One result by itself, as torch's schemas want it."""
    return results if len(results) != 1 else results[0]


def _wrapped(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
