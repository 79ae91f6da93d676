"""What would be replaced in one layer, or why nothing is."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from subquad.inference.optimize import families, seam
from subquad.inference.optimize.continued import continue_state
from subquad.inference.optimize.guards import digest, wrapped_only_by

STANDARD_ARGUMENTS = ["self", "hidden_states", "cache", "attention_mask"]


@dataclass(frozen=True)
class Replacement:
    """Methods for one class of layers, by name; or the reason why there are none."""

    methods: dict[str, Callable[..., Any]]
    ops: tuple[str, ...]
    reason: str | None = None
    wants_index: bool = False  # whether ours must know the layer's place in the model


def of_layer(module: nn.Module) -> Replacement | None:
    """What is ours for this layer; None where it has nothing that we could replace."""
    found = _of_class(type(module))
    if found is None or found.reason is not None:
        return found
    for name in found.methods:
        reason = seam.obstacle(module, name)
        if reason is not None:
            return Replacement({}, found.ops, reason)
    if _runs_compiled_kernels(module):
        return Replacement({}, found.ops, "its own package's GPU kernels run already")
    return found


@cache
def _of_class(kind: type[nn.Module]) -> Replacement | None:
    own = families.LAYERS.get(kind.__name__)
    if own is not None and _from_transformers(kind):
        return _own(kind, own)
    forward = getattr(kind, "forward", None)
    if forward is None:
        return None
    function = inspect.unwrap(forward)
    read = set(getattr(getattr(function, "__code__", None), "co_names", ()))
    names = [name for name in families.FUNCTIONS if name in read and name in function.__globals__]
    return _shared(forward, names) if names else None


def _from_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")


def _own(kind: type[nn.Module], layer: families.OwnLayer) -> Replacement:
    for name, (known, _) in layer.methods.items():
        method = getattr(kind, name, None)
        if method is None or digest(method) not in known or not wrapped_only_by("transformers", method):
            return Replacement({}, layer.ops, f"its {name} is not the one known from transformers 5.24")
    methods = {name: ours for name, (_, ours) in layer.methods.items()}
    return Replacement(methods, layer.ops, wants_index=layer.wants_index)


def _shared(forward: Callable[..., Any], names: list[str]) -> Replacement:
    function = seam.innermost(forward)
    ops = tuple(dict.fromkeys(families.FUNCTIONS[name].op for name in names))
    for name in names:
        shared = families.FUNCTIONS[name]
        for part, known in {name: shared.digests, **shared.companions}.items():
            theirs = function.__globals__.get(part)
            if not callable(theirs) or digest(theirs) not in known:
                return Replacement({}, ops, f"its {part} is not the one known from transformers 5.24")
    shadow = seam.shadow_of(function.__globals__["__name__"], {n: families.FUNCTIONS[n].ours for n in names})
    try:
        method = seam.clone(forward, shadow.__dict__)
    except ValueError as error:
        return Replacement({}, ops, str(error))
    if list(inspect.signature(function).parameters)[:4] == STANDARD_ARGUMENTS:
        if "mamba_selective_scan" in names:
            method = continue_state(method)
        step = families.STEPS.get(digest(forward) or "")
        if step is not None and wrapped_only_by("transformers", forward):
            method = step_first(method, step)
    return Replacement({"forward": method}, ops)


def step_first(forward: Callable[..., Any], step: Callable[..., torch.Tensor | None]) -> Callable[..., Any]:
    """A method that gives one token to ``step`` and goes the way of ``forward`` where that returns None."""

    def decoding(
        self: Any, hidden_states: torch.Tensor, cache: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if cache is not None and hidden_states.shape[1] == 1 and not torch.compiler.is_compiling():
            output = step(self, hidden_states, cache, attention_mask, kwargs)
            if output is not None:
                return output
        return forward(self, hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)

    return decoding


def _runs_compiled_kernels(module: nn.Module) -> bool:
    """Whether the layer is on a GPU where its functions come from a package, not from transformers' torch code."""
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type == "cpu":
        return False
    names = inspect.unwrap(type(module).forward).__globals__
    return any(_comes_from_package(names[name]) for name in families.FUNCTIONS if name in names)


def _comes_from_package(function: Any) -> bool:
    while function is not None:
        cells = dict(zip(getattr(getattr(function, "__code__", None), "co_freevars", ()), function.__closure__ or ()))
        if "is_new_implementation" in cells:
            return bool(cells["is_new_implementation"].cell_contents)
        function = getattr(function, "__wrapped__", None)
    return False


def forget() -> None:
    """Look at every class anew: modules of transformers may have been changed."""
    _of_class.cache_clear()
