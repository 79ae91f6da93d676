"""The one call, and its account of what it changed, what it left and why."""

import re
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import nn

from subquad.inference.optimize import families, replacement, seam


@dataclass(frozen=True)
class Layer:
    """One layer that has something recurrent.

    Attributes:
        path: its name in the model, as in ``model.named_modules()``.
        kind: its class.
        ops: the operations of ours that compute it.
        reason: why it was left as it is; None where it is ours.
    """

    path: str
    kind: str
    ops: tuple[str, ...]
    reason: str | None


class Optimization:
    """What :func:`optimize` did to a model, or would do. As a context manager it undoes that at the end.

    Attributes:
        family: the model's type.
        layers: every layer that has something recurrent, in order.
        done: False for a dry run, and after :meth:`undo`.
    """

    def __init__(self, model: nn.Module, family: str, layers: tuple[Layer, ...], done: bool) -> None:
        self._model, self.family, self.layers, self.done = model, family, layers, done

    @property
    def replaced(self) -> tuple[Layer, ...]:
        """The layers that are, or would be, ours."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    def undo(self) -> None:
        """Give the model its own methods back."""
        undo(self._model)
        self.done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        if not self.layers:
            return f"{self.family}: nothing to replace: {families.NOTHING_TO_REPLACE}"
        verb = "replaced" if self.done else "would be replaced"
        counts = Counter((layer.kind, layer.ops, layer.reason) for layer in self.layers)
        lines = []
        for (kind, ops, reason), count in counts.items():
            said = f"{verb} by {', '.join(ops)}" if reason is None else f"left as it is: {reason}"
            lines.append(f"{self.family}: {count} x {kind} {said}")
        return "\n".join(lines)

    __repr__ = __str__


def optimize(model: nn.Module, *, dry_run: bool = False) -> Optimization:
    """Let our operations compute the recurrent layers of a transformers model, for prompts, training and decoding.

    Logits, gradients and caches stay what they are, up to rounding. Parameters, buffers and class stay too: the model
    saves, loads, copies and trains as before. Only this instance changes.

    Args:
        model: any module that holds layers of ``transformers.models``; a second call changes nothing more.
        dry_run: only say what would change.

    Returns:
        What was done. Print it; ``undo()`` takes it back, as does the end of a ``with`` block.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2)).eval()
        >>> print(optimize(model))
        mamba: 2 x MambaMixer replaced by short_convolution, selective_scan
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a torch module, such as a model of transformers; got {type(model).__name__}")
    layers = []
    for path, module in model.named_modules():
        found = replacement.of_layer(module)
        if found is None:
            continue
        layers.append(Layer(path, type(module).__name__, found.ops, found.reason))
        if not dry_run:
            for name, method in found.methods.items():
                seam.bind(module, name, method)
            if found.methods and found.wants_index:
                place = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", path)
                module.__dict__[seam.LAYER_INDEX] = int(place[1]) if place else None
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None) or type(model).__name__
    return Optimization(model, family, tuple(layers), done=not dry_run)


def undo(model: nn.Module) -> bool:
    """Give every layer its own methods back; whether there was one of ours."""
    return sum(seam.unbind(module) for module in model.modules()) > 0
