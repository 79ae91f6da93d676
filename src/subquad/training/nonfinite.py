"""A loss, gradient or weight that is not finite: which step, which batch, which layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class NonFiniteLoss(FloatingPointError):
    """Training met a NaN or an infinity. Nothing of the step was kept: the last checkpoint is the last good state.

    Attributes:
        step: the optimizer step, counted from 1.
        batch: the index i of ``data.batch(i)``; None where no single batch is to blame (a gradient, a weight).
        layer: dotted name of the first module with a non-finite output, or of a parameter; or ``"inputs"``, ``"loss"``.
    """

    def __init__(self, step: int, batch: int | None, layer: str, what: str) -> None:
        where = f" in batch {batch}" if batch is not None else ""
        super().__init__(f"step {step}{where}: {what}")
        self.step, self.batch, self.layer, self.what = step, batch, layer, what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step, self.batch, self.layer, self.what)


def first_non_finite(model: nn.Module, inputs: Any, forward: Callable[[], Tensor]) -> tuple[str, str]:
    """Repeats a forward pass and finds where its first non-finite value comes from.

    Args:
        model: watched with hooks, which are removed again.
        inputs: what the forward pass is given.
        forward: runs the model and returns the loss.

    Returns:
        The layer's name and a sentence about it. A module whose output is the first to be non-finite is named, unless a
        NaN or +infinity already came in (-infinity may be a mask): then the module that called it is named.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return name, f"the weight {name!r} is not finite ({_listed(_kinds(parameter))})"
    if _kinds(inputs):
        return "inputs", f"the inputs are not finite ({_listed(_kinds(inputs))})"

    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    callers: list[str] = []
    found: list[tuple[str, str]] = []

    def enter(module: nn.Module, args: Any) -> None:
        callers.append(names[module])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        callers.pop()
        if found or not _kinds(output):
            return
        name, kinds = names[module], _kinds(output)
        incoming = _kinds((args, kwargs)) - {"-inf"}
        if incoming and callers:
            found.append((callers[-1], f"layer {callers[-1]!r} passes {_listed(incoming)} to {name!r}"))
        else:
            found.append((name, f"the first non-finite output ({_listed(kinds)}) is that of layer {name!r}"))

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave, with_kwargs=True) for module in names]
    try:
        loss = forward()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    if not torch.isfinite(loss).all():
        return "loss", "every layer's output is finite, so it arises in the objective itself"
    return (
        "loss",
        "it did not come back when the batch was repeated: the model is not a function of its inputs and the seed",
    )


def first_non_finite_parameter(model: nn.Module, *, gradient: bool) -> str | None:
    """Name of the first parameter that is not finite, or whose gradient is not."""
    for name, parameter in model.named_parameters():
        value = parameter.grad if gradient else parameter
        if value is not None and not torch.isfinite(value).all():
            return name
    return None


def _kinds(values: Any) -> set[str]:
    """Which of NaN, +infinity and -infinity occur in the floating tensors of a nest."""
    kinds = set()
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            real = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
            kinds |= {"NaN"} if torch.isnan(real).any() else set()
            kinds |= {"+inf"} if torch.isposinf(real).any() else set()
            kinds |= {"-inf"} if torch.isneginf(real).any() else set()
    return kinds


def _listed(kinds: set[str]) -> str:
    return " and ".join(sorted(kinds))
