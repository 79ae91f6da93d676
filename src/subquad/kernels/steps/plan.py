"""Whether one token may go through a whole mixer in one kernel, and the mixer's weights as arrays for the kernel.

The way is taken only where nothing could tell it from the ordinary one: no gradient, no tracing or other interception,
float32 on a CPU, and every part of the layer exactly the part that the kernel computes. A layer is read once, by a
function of the mixer; what it read is noted and compared before every use, so that edited options, new hooks, adapters
and exchanged weights are seen. Weights that change in place need no notice: the arrays share their memory.
"""

import importlib
import operator
import os
from collections.abc import Callable
from functools import cache
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from subquad.kernels import backends

#: Multiplications with weights, times torch's threads, up to which one kernel on one thread is the faster way.
LARGEST_WORK = 2**24
_NOTHING = object()
_SHAPE = operator.attrgetter("shape")


class NotPlainError(Exception):
    """Raised while a layer is read: it holds something that the kernels do not compute."""


def serves(x: Tensor, dim: int) -> bool:
    """Whether ``x (B, 1, dim)`` is one plain float32 token a sequence, on a CPU, to be computed by 'cpu' kernels."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and not intercepted(x)
        and x.is_cpu
        and x.dtype is torch.float32
        and x.ndim == 3
        and x.shape == (x.shape[0] or 1, 1, dim)
        # what backends.resolve("auto") makes of float32 on a CPU, in half its time
        and backends.INSTALLED["numba"]
        and os.environ.get("SUBQUAD_BACKEND", "auto") in ("auto", "cpu")
    )


def intercepted(x: Tensor) -> bool:
    """Whether calls of torch's operators mean more than their values: autocast, modes, transforms, tracing, hooks."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def fits(tensor: object, *shape: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a part of a state is a plain contiguous tensor of this shape on a CPU."""
    return (
        type(tensor) is Tensor
        and tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
    )


class Reading:
    """Notes what is read of a layer. Its methods raise :class:`NotPlainError` for what kernels do not compute.

    The notes are columns, so that :meth:`holds` compares each in one pass of the interpreter's own loops: it runs for
    every token.
    """

    def __init__(self) -> None:
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._hooks: list[dict[int, Any]] = []
        self._modules: list[nn.Module] = []
        self._kinds: list[type] = []
        self._children: list[dict[str, Any]] = []
        self._counts: list[int] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._shapes: list[torch.Size] = []
        self.work = 0  # multiplications with projections' weights, per row

    def require(self, condition: bool) -> None:
        if not condition:
            raise NotPlainError

    def value(self, owner: object, name: str) -> Any:
        """The attribute ``name`` that the object itself holds (not its class)."""
        return self._note(owner.__dict__, name)

    def child(self, owner: nn.Module, name: str, kind: type) -> Any:
        """The submodule ``name``: of exactly this class, without hooks."""
        child = self._note(owner._modules, name)
        self.require(type(child) is kind)
        hooks = [self.value(child, "_forward_hooks"), self.value(child, "_forward_pre_hooks")]
        self.require(not any(hooks) and self.value(child, "forward") is _NOTHING)
        self._hooks += hooks
        self._modules.append(child)
        self._kinds.append(kind)
        self._children.append(child._modules)
        self._counts.append(len(child._modules))
        return child

    def tensor(self, owner: nn.Module, name: str, *shape: int) -> np.ndarray:
        """The parameter or buffer ``name`` as an array on its memory."""
        tensor = self._note(owner._parameters if name in owner._parameters else owner._buffers, name)
        self.require(type(tensor) in (Tensor, nn.Parameter))
        plain: Tensor = tensor.detach()
        self.require(fits(plain, *shape))
        self._tensors.append(tensor)
        self._addresses.append(tensor.data_ptr())
        self._shapes.append(tensor.shape)
        return plain.numpy()

    def absent(self, owner: nn.Module, name: str) -> bool:
        """Whether the parameter or submodule ``name`` is one that this layer was built without."""
        return self._note(owner._parameters if name in owner._parameters else owner.__dict__, name) is None

    def linear(self, owner: nn.Module, name: str, rows: int, columns: int) -> np.ndarray:
        """The weight of the projection ``name``, a plain ``nn.Linear`` without bias."""
        projection = self.child(owner, name, nn.Linear)
        self.require(self.absent(projection, "bias"))
        self.work += rows * columns
        return self.tensor(projection, "weight", rows, columns)

    def _note(self, place: dict[str, Any], name: str) -> Any:
        value = place.get(name, _NOTHING)
        self._places.append(place)
        self._names.append(name)
        self._values.append(value)
        return value

    def holds(self) -> bool:
        """Whether all that was read is as it was."""
        return (
            all(map(operator.is_, map(dict.get, self._places, self._names, repeat(_NOTHING)), self._values))
            and not any(self._hooks)
            and list(map(type, self._modules)) == self._kinds
            and list(map(len, self._children)) == self._counts
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_SHAPE, self._tensors)) == self._shapes
            and all(map(Tensor.is_contiguous, self._tensors))
        )


class StepCache:
    """A mixer's last reading. Copies and pickles of it are empty; replaced as a whole, so threads may share it."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[Reading, Any] | None = None

    def __reduce__(self) -> tuple[type["StepCache"], tuple[()]]:
        return StepCache, ()

    def clear(self) -> None:
        self._last = None

    def layer(self, read: Callable[[Reading], Any], rows: int) -> Any:
        """What ``read`` makes of the layer, read again where something changed; None where a kernel cannot serve."""
        last = self._last
        if last is None or not last[0].holds():
            reading = Reading()
            try:
                last = reading, read(reading)
            except NotPlainError:
                self.clear()
                return None
            self._last = last
        reading, layer = last
        return layer if rows * reading.work * torch.get_num_threads() <= LARGEST_WORK else None


def run(family: str, layer: Any, x: Tensor, states: tuple[Tensor | None, ...], *more: Any) -> list[Any] | None:
    """Output and new states of one token, fresh tensors; None where a gate lies outside its range.

    Args:
        family: name of a kernel of :mod:`.families`.
        layer: what the kernel reads of the layer.
        x: ``(B, 1, D)``.
        states: tensors that the kernel carries on, checked by :func:`fits`; None for those that the layer does without.
        more: further arguments of the kernel.
    """
    x = x.contiguous()
    read = (x, *states)
    results = [None if tensor is None else torch.empty_like(tensor) for tensor in read]
    outside = _kernel(family)(tuple(layer), x.shape[0], *map(_address, read), *map(_address, results), *more)
    return None if outside else results


@cache
def _kernel(family: str) -> Callable[..., bool]:
    kernel: Callable[..., bool] = getattr(importlib.import_module("subquad.kernels.steps.families"), family)
    return kernel


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
